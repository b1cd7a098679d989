"""The small heads on top of a drafter: Markov bias and confidence."""

import mlx.core as mx
import mlx.nn as nn


class MarkovHead(nn.Module):
    """Biases each draft position by the token before it: `W2 W1[previous]` (type `vanilla`).

    Args:
        vocab_size: the target's; any token can come before a draft.
        rank: of the bias.
        hidden_size: of the block's output.
        drafted: tokens that can be drafted, if not all.

    Source:
        DSpark, eq. 4 and section on sequential heads; tensors as in DeepSpec checkpoints.
    """

    def __init__(
        self, vocab_size: int, rank: int, hidden_size: int, drafted: int | None = None
    ) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, drafted or vocab_size, bias=False)

    def embed(self, previous: mx.array) -> mx.array:
        """Look up the embedding [..., r] of the tokens [...] before each position."""
        return self.markov_w1(previous)

    def bias(
        self, embedding: mx.array, hidden: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Compute one position's bias.

        Args:
            embedding: [..., r], from `embed`.
            hidden: [..., E], the block's output at this position, after the final norm.
            state: what the position before returned; None at the first.

        Returns:
            The bias [..., V] and the state for the next position.
        """
        return self.markov_w2(embedding), None

    def biases(self, embedding: mx.array, hidden: mx.array) -> mx.array:
        """Compute the biases of whole blocks at once, the true tokens given.

        Args:
            embedding: [..., K, r], from `embed`.
            hidden: [..., K, E].

        Returns:
            [..., K, V].
        """
        return self.bias(embedding, hidden, None)[0]


class GatedMarkovHead(MarkovHead):
    """Type `gated`: `W2 (sigmoid(G [hidden; e] + b) * e)`."""

    def __init__(
        self, vocab_size: int, rank: int, hidden_size: int, drafted: int | None = None
    ) -> None:
        super().__init__(vocab_size, rank, hidden_size, drafted)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def bias(
        self, embedding: mx.array, hidden: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Compute one position's bias; see `MarkovHead.bias`."""
        gate = mx.sigmoid(self.gate_proj(mx.concatenate([hidden, embedding], axis=-1)))
        return self.markov_w2(gate * embedding), None


class RnnMarkovHead(MarkovHead):
    """Type `rnn`: a gated recurrence over the block, its state reset for each block."""

    def __init__(
        self, vocab_size: int, rank: int, hidden_size: int, drafted: int | None = None
    ) -> None:
        super().__init__(vocab_size, rank, hidden_size, drafted)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def bias(
        self, embedding: mx.array, hidden: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Compute one position's bias; see `MarkovHead.bias`.

        The output part comes from the *old* state, which is inside the joint input.
        """
        state = mx.zeros_like(embedding) if state is None else state
        joint = self.joint_proj(mx.concatenate([state, embedding, hidden], axis=-1))
        gate, candidate, output = mx.split(joint, 3, axis=-1)
        gate = mx.sigmoid(gate)
        new_state = gate * state + (1 - gate) * mx.tanh(candidate)
        return self.markov_w2(mx.tanh(output)), new_state

    def biases(self, embedding: mx.array, hidden: mx.array) -> mx.array:
        """Compute the biases of whole blocks, position by position; see `MarkovHead.biases`."""
        state, biases = None, []
        for k in range(hidden.shape[-2]):
            bias, state = self.bias(embedding[..., k, :], hidden[..., k, :], state)
            biases.append(bias)
        return mx.stack(biases, axis=-2)


MARKOV_HEADS = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RnnMarkovHead}


class ConfidenceHead(nn.Module):
    """Estimates P(draft accepted | all earlier ones in the block accepted), as a logit.

    Source:
        DSpark, eq. 7; the reference code has a bias that the paper omits.
    """

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(input_size, 1)

    def __call__(self, features: mx.array) -> mx.array:
        """Map [hidden; e] features [..., E (+ r)] to float32 logits [...]."""
        return self.proj(features).squeeze(-1).astype(mx.float32)
