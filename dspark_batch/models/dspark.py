"""The DSpark drafter: a parallel block pass and a small sequential head, as in DeepSpec."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.models.drafter_config import DrafterConfig
from dspark_batch.models.heads import MARKOV_HEADS, ConfidenceHead
from dspark_batch.models.qwen3 import DraftLayer, KeyValues
from dspark_batch.numerics.masks import ragged_block

# Chooses the tokens [B] of block position k from logits [B, V].
Choose = Callable[[mx.array, int], mx.array]


class Draft(NamedTuple):
    """What a drafter proposes for each slot; K drafts."""

    tokens: mx.array  # [B, K] int32
    logits: mx.array | None = None  # [B, K, V], Markov bias included; None: nothing was drafted
    confidence: mx.array | None = None  # [B, K] float32 logits; None: no confidence head


class Context(Protocol):
    """Where the drafter keeps keys and values of committed positions, ragged over slots."""

    lengths: mx.array  # [B] int32, context positions of each slot
    capacity: int  # positions in the buffers
    layers: Sequence[KeyValues]


class DSparkDrafter(nn.Module):
    """A drafter as DeepSpec stores it; parameter names are the checkpoint's tensor names."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        size, vocab = config.hidden_size, config.vocab_size
        self.embed_tokens = nn.Embedding(vocab, size)
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.layers = [DraftLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(size, vocab, bias=False)
        self.markov_head: nn.Module | None = None
        if config.markov_head_type is not None:
            head = MARKOV_HEADS[config.markov_head_type]
            self.markov_head = head(vocab, config.markov_rank, size)
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            extra = config.markov_rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(size + extra)

    @property
    def block_size(self) -> int:
        """Positions that one pass drafts."""
        return self.config.block_size

    @property
    def num_layers(self) -> int:
        """Layers that keep context keys and values."""
        return self.config.num_hidden_layers

    @property
    def has_confidence(self) -> bool:
        """Whether drafts come with confidence logits."""
        return self.confidence_head is not None

    def fuse(self, features: mx.array) -> mx.array:
        """Fuse tapped features [B, T, m*E] into context [B, T, E]; DSpark, eq. 2."""
        return self.hidden_norm(self.fc(features))

    def extend(self, context: Context, features: mx.array) -> None:
        """Write keys and values of T further positions behind each slot's context.

        Args:
            context: written in place; its lengths stay, the caller says how many positions hold.
            features: [B, T, m*E], the target's tapped outputs at these positions.
        """
        fused, offset = self.fuse(features), context.lengths[:, None]
        for layer, cache in zip(self.layers, context.layers, strict=True):
            cache.update_and_fetch(*layer.keys_values(fused, offset))

    def propose(self, anchor: mx.array, context: Context, num_drafts: int, choose: Choose) -> Draft:
        """Draft from the anchor [B], at most `block_size` tokens, each taken by `choose`.

        The whole block always runs, as in training, so a shorter draft is a prefix of a longer one.
        The block's own keys and values lie behind the context and do not stay.
        """
        masks = mx.full((anchor.shape[0], self.block_size - 1), self.config.mask_token_id)
        block = mx.concatenate([anchor[:, None], masks.astype(anchor.dtype)], axis=1)
        visible = ragged_block(context.lengths, self.block_size, context.capacity)
        hidden = self.block_hidden(block, context.layers, context.lengths[:, None], visible)
        return self._draft(anchor, hidden[:, :num_drafts], choose)

    def block_hidden(
        self, block: mx.array, caches: Sequence[KeyValues], offset: mx.array, mask: mx.array
    ) -> mx.array:
        """Run A blocks per row through all layers and the final norm.

        Args:
            block: [B, A*K] token ids, each block an anchor and its masks.
            caches: one per layer, holding the context's keys and values.
            offset: [B, A] int32, the anchors' positions.
            mask: bool, broadcasts to [B, heads, A*K, keys].

        Returns:
            [B, A*K, E].
        """
        hidden = self.embed_tokens(block)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, cache, offset, mask)
        return self.norm(hidden)

    def base_logits(self, hidden: mx.array) -> mx.array:
        """Map block output [..., E] to logits [..., V], before the Markov bias."""
        return self.lm_head(hidden)

    def confidence(self, hidden: mx.array, embedding: mx.array | None) -> mx.array | None:
        """Map block output [..., E] and Markov embeddings [..., r] to confidence logits [...]."""
        if self.confidence_head is None:
            return None
        if self.config.confidence_head_with_markov:
            hidden = mx.concatenate([hidden, embedding], axis=-1)
        return self.confidence_head(hidden)

    def _draft(self, anchor: mx.array, hidden: mx.array, choose: Choose) -> Draft:
        base = self.base_logits(hidden)
        previous, state, tokens, logits, embeddings = anchor, None, [], [], []
        for k in range(hidden.shape[1]):
            corrected = base[:, k]
            if self.markov_head is not None:
                embeddings.append(self.markov_head.embed(previous))
                bias, state = self.markov_head.bias(embeddings[-1], hidden[:, k], state)
                corrected = corrected + bias
            previous = choose(corrected, k).astype(anchor.dtype)
            tokens.append(previous)
            logits.append(corrected)
        embedding = mx.stack(embeddings, axis=1) if embeddings else None
        confidence = self.confidence(hidden, embedding)
        return Draft(mx.stack(tokens, axis=1), mx.stack(logits, axis=1), confidence)
