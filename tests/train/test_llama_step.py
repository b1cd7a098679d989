"""One training step of a new drafter for a llama target, against plain NumPy in float64.

The reference draws nothing and shares no code with the trainer: loss terms from the method's
formulas, gradients by differences of that loss, the update by AdamW's.
"""

import checkpoints
import families
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import Reference, rms, rotate, silu

from dspark_batch.numerics.arrays import named_arrays
from dspark_batch.pair import load_pair
from dspark_batch.train.blocks import draw_anchors
from dspark_batch.train.fit import Schedule, Trainer
from dspark_batch.train.learn import drafting_loss
from dspark_batch.train.session import _student
from dspark_batch.train.training import Asked

BLOCK, ANCHORS, TAPS = 4, 3, (0, 2)
LENGTHS = ((5, 17), (9, 20))  # of a prompt, and with its answer; rows are as long as the longest
DECAY, MIX = 4.0, {"dspark": (0.1, 0.9, 1.0), "dflash": (1.0, 0.0, 0.0)}
KEY = mx.random.key(5)
PROGRESS = 0.25  # of a training that begins with cross entropy once and no distance


class Llama:
    """The target of one sequence: what its layers give, and its logits."""

    def __init__(self, config, model):
        self.config = config
        self.weights = {name: np.array(a, np.float64) for name, a in named_arrays(model)}

    def __call__(self, tokens):
        x, outputs = self.weights["model.embed_tokens.weight"][tokens], []
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            x = x + self.attend(at, self.norm(f"{at}.input_layernorm", x))
            inner = self.norm(f"{at}.post_attention_layernorm", x)
            gate = silu(self.linear(f"{at}.mlp.gate_proj", inner))
            up = self.linear(f"{at}.mlp.up_proj", inner)
            x = x + self.linear(f"{at}.mlp.down_proj", gate * up)
            outputs.append(x)
        return outputs, self.linear("lm_head", self.norm("model.norm", x))

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, name, x):
        return rms(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def attend(self, at, x):
        size, dim = len(x), self.config["head_dim"]

        def heads(name, *, turned):
            rows = self.linear(f"{at}.self_attn.{name}", x).reshape(size, -1, dim)
            return rotate(rows, np.arange(size), self.config["rope_theta"]) if turned else rows

        queries, keys = heads("q_proj", turned=True), heads("k_proj", turned=True)
        group = queries.shape[1] // keys.shape[1]
        keys, values = (np.repeat(a, group, 1) for a in (keys, heads("v_proj", turned=False)))
        score = np.einsum("qhd,khd->hqk", queries, keys) * dim**-0.5
        score = np.where(np.tri(size, dtype=bool), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", weight, values).reshape(size, -1)
        return self.linear(f"{at}.self_attn.o_proj", out)


class Step:
    """A student, its batch, and the reference's view of both."""

    def __init__(self, directory, config, kind):
        pair = load_pair(target=str(directory), dtype="float32")
        rank = 8 if kind == "dspark" else None
        asked = Asked(kind=kind, layers=2, block=BLOCK, taps=TAPS, rank=rank, seed=3)
        self.student, self.mix = _student(pair, asked, _NothingSeen()), _mix(kind)
        self.drafter, self.config = self.student.drafter, self.student.config
        self._wake()
        rng = np.random.default_rng(1)
        size = max(end for _, end in LENGTHS)
        self.tokens = np.zeros((len(LENGTHS), size), np.int32)
        self.answers = np.zeros((len(LENGTHS), size), bool)
        for row, (prompt, end) in enumerate(LENGTHS):
            self.tokens[row, :end] = rng.integers(3, 50, end)
            self.answers[row, prompt:end] = True
        self.batch = mx.array(self.tokens), mx.array(self.answers), KEY, PROGRESS
        target = Llama(config, pair.target.model)
        self.known = [target(row[:end]) for row, (_, end) in zip(self.tokens, LENGTHS, strict=True)]
        anchors, kept = draw_anchors(mx.array(self.answers), ANCHORS, KEY)
        self.anchors = [
            [a for a, is_kept in zip(*row, strict=True) if is_kept]
            for row in zip(anchors.tolist(), kept.tolist(), strict=True)
        ]

    def _wake(self):
        """Make its weights large enough that every term matters; norms too are something else."""
        keys = mx.random.split(mx.random.key(4), 100)
        trained = tree_flatten(self.drafter.trainable_parameters())
        woken = [
            (name, 5 * a if a.ndim == 2 else a + 0.3 * mx.random.normal(a.shape, key=key))
            for key, (name, a) in zip(keys, trained, strict=False)
        ]
        self.drafter.load_weights(woken, strict=False)

    @property
    def weights(self):
        return {name: np.array(a, np.float64) for name, a in named_arrays(self.drafter)}

    def loss(self):
        return drafting_loss(
            self.drafter, self.student.target, self.student.mix, lambda width: ANCHORS
        )

    def expected(self, weights, accept=None):
        """Loss, its terms, and how much each slot accepts; `accept`: as it was, no gradient."""
        reference = Reference(self.config, weights)
        total, sums, accepted = 0.0, np.zeros(3), []
        given = iter(accept) if accept is not None else None
        for row, anchors in enumerate(self.anchors):
            outputs, known = self.known[row]
            features = np.concatenate([outputs[layer] for layer in TAPS], -1)
            for anchor in anchors:
                for k, (q, log_q, z, p, label) in enumerate(
                    self.slots(reference, row, anchor, features, known)
                ):
                    distance = np.abs(q - p).sum()
                    accepted.append(np.clip(1 - distance / 2, 0, 1))
                    right = accepted[-1] if given is None else next(given)
                    doubt = np.log1p(np.exp(-abs(z))) + max(z, 0) - z * right
                    weight = np.exp(-k / DECAY)
                    total += weight
                    sums += weight * np.array([-log_q[label], distance, doubt])
        terms = sums / (total + 1e-6)
        return float(terms @ self.mix), terms, accepted

    def slots(self, reference, row, anchor, features, known):
        """What each slot of a block that counts drafts, and what the target would."""
        tokens, end = self.tokens[row], LENGTHS[row][1]
        ids = [tokens[anchor], *[self.config["mask_token_id"]] * (BLOCK - 1)]
        embedded = reference.weights["embed_tokens.weight"][ids]
        hidden = reference.hidden(embedded, features[:anchor])
        for k in range(min(BLOCK, end - 1 - anchor)):
            z, logits = 0.0, reference.linear("lm_head", hidden[k])
            if self.config["markov_rank"]:
                embedding = reference.weights["markov_head.markov_w1.weight"][tokens[anchor + k]]
                logits = logits + reference.weights["markov_head.markov_w2.weight"] @ embedding
                joint = np.concatenate([hidden[k], embedding])
                z = reference.linear("confidence_head.proj", joint)[0]
            log_q = logits - np.logaddexp.reduce(logits)
            log_p = known[anchor + k] - np.logaddexp.reduce(known[anchor + k])
            yield np.exp(log_q), log_q, z, np.exp(log_p), tokens[anchor + 1 + k]


def _mix(kind):
    """The weights of the terms, on the way from the first to the last ones."""
    last = np.array(MIX[kind])
    return (1 - PROGRESS) * np.array([1, 0, last[2]]) + PROGRESS * last


class _NothingSeen:
    """Answers that have no token: any may be the mask."""

    def seen(self, vocab_size):
        return np.zeros(vocab_size, bool)


@pytest.fixture(params=["dspark", "dflash"])
def step(request, tmp_path):
    config = families.family("llama", tie_word_embeddings=False)
    return Step(checkpoints.write_target(tmp_path / "t", config), config, request.param)


def _gradients(step):
    def loss(params):
        step.drafter.update(params)
        return step.loss()(*step.batch)

    values, grads = mx.value_and_grad(loss)(step.drafter.trainable_parameters())
    return values, {name: np.array(a, np.float64) for name, a in tree_flatten(grads)}


def test_the_loss_and_its_terms_are_the_formulas(step):
    values, _ = _gradients(step)
    loss, terms, _ = step.expected(step.weights)
    assert values[0].item() == pytest.approx(loss, rel=1e-5)
    for value, term, share in zip(values[1:4], terms, step.mix, strict=True):
        if share:
            assert value.item() == pytest.approx(term, rel=1e-5)


def test_gradients_are_differences_of_the_loss(step):
    _, gradients = _gradients(step)
    weights, (_, _, accept) = step.weights, step.expected(step.weights)
    frozen = {"embed_tokens.weight", "lm_head.weight"}
    assert gradients.keys() == weights.keys() - frozen
    rng, little = np.random.default_rng(2), 1e-6
    for name, gradient in gradients.items():
        way = rng.standard_normal(gradient.shape)
        losses = [
            step.expected(weights | {name: weights[name] + sign * little * way}, accept)[0]
            for sign in (1, -1)
        ]
        expected = (losses[0] - losses[1]) / (2 * little)
        size = np.linalg.norm(gradient)
        assert size > 1e-6, name
        assert abs((gradient * way).sum() - expected) < 1e-3 * size, name


def test_the_first_update_is_muons_for_the_layers_and_adamws_for_the_rest(step):
    _, gradients = _gradients(step)
    before = step.weights
    schedule = Schedule(steps=10, peak_lr=0.04, warmup=4)
    trainer = Trainer(step.drafter, step.loss(), schedule)
    trainer.step(*step.batch)
    after = {
        name[15:]: np.array(a, np.float64)
        for name, a in trainer.state().items()
        if name.startswith("masters.params.")
    }
    size = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    inner = {name for name in gradients if name.endswith("_proj.weight") or name == "fc.weight"}
    assert len(inner) == 1 + 2 * 7
    for name, gradient in gradients.items():
        clipped, rate = gradient * min(1.0, 1.0 / size), 0.04 / 4
        if name in inner:
            step_of = (
                8
                * rate
                * _orthogonal(clipped)
                * max(1, gradient.shape[0] / gradient.shape[1]) ** 0.5
            )
            gap = np.linalg.norm(after[name] - before[name] + step_of)
            assert gap < 1e-2 * np.linalg.norm(step_of), name
            continue
        expected = before[name] - rate * clipped / (np.abs(clipped) + 1e-8)
        clear = np.abs(clipped) > 1e-5  # float32 may see another sign of less
        gap = np.abs(after[name] - expected)[clear]
        assert gap.size == 0 or gap.max() < 1e-4, name


def _orthogonal(matrix):
    """Make all singular values nearly 1, by five steps of Newton and Schulz, as Muon does."""
    x = matrix / np.linalg.norm(matrix)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
