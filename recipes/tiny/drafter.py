"""Train a drafter: block drafting from random anchors of the target's own answers.

Source:
    DSpark, section on training, and DeepSpec's trainer: anchors, masks, targets and loss.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.models.taps import Taps
from recipes.tiny.fit import Schedule, Trainer

LOG_EVERY = 200
TINY = 1e-6  # keeps the loss finite when no slot counts


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMix:
    """How much of each term the loss has; w_k = exp(-k / decay) for slot k."""

    cross_entropy: float
    total_variation: float  # of the L1 distance to the target's distribution
    confidence: float
    decay: float = 4.0


DSPARK = LossMix(cross_entropy=0.1, total_variation=0.9, confidence=1.0)
DFLASH = LossMix(cross_entropy=1.0, total_variation=0.0, confidence=0.0)


class Answers(NamedTuple):
    """N prompts with the target's answers, padded to the same length."""

    tokens: mx.array  # [N, T] int32
    answers: mx.array  # [N, T] bool, tokens of an answer, its end marker included


class Teacher(NamedTuple):
    """What the target knew at every position."""

    features: mx.array  # [N, T, m*E], tapped outputs
    last_hidden: mx.array  # [N, T, E], after the final norm


class Blocks(NamedTuple):
    """A anchors per row and what their K slots should draft."""

    anchors: mx.array  # [N, A] int32, positions
    labels: mx.array  # [N, A, K] int32, tokens at anchor + 1 + k
    counts: mx.array  # [N, A, K] bool, slots that the loss looks at


class Drafts(NamedTuple):
    """The drafter's view of all slots, given the true tokens before each."""

    logits: mx.array  # [N, A, K, V], Markov bias included
    confidence: mx.array | None  # [N, A, K] float32 logits


def draw_anchors(answers: mx.array, num_anchors: int, key: mx.array) -> tuple[mx.array, mx.array]:
    """Draw positions whose own and next token belong to an answer, without replacement.

    Returns:
        [N, A] int32 positions in rising order, and [N, A] bool, false where a row has too few.
    """
    fit = answers[:, :-1] & answers[:, 1:]
    order = mx.where(fit, mx.random.uniform(shape=fit.shape, key=key), 2.0)
    drawn = mx.argsort(order, axis=1)[:, :num_anchors].astype(mx.int32)
    kept = mx.arange(drawn.shape[1]) < fit.sum(axis=1, keepdims=True)
    drawn = mx.sort(mx.where(kept, drawn, answers.shape[1]), axis=1)
    kept = drawn < answers.shape[1]
    return mx.where(kept, drawn, 0), kept


def make_blocks(batch: Answers, anchors: mx.array, kept: mx.array, size: int) -> Blocks:
    """Look up the labels of each block and which of them count.

    A slot counts while it and all slots before it are inside the answer.
    """
    length = batch.tokens.shape[1]
    position = anchors[..., None] + 1 + mx.arange(size)
    inside = (position < length) & kept[..., None]
    position = mx.minimum(position, length - 1)
    labels = _pick(batch.tokens, position)
    inside = inside & _pick(batch.answers, position)
    return Blocks(anchors, labels, mx.cumprod(inside.astype(mx.int32), axis=-1) > 0)


def _pick(rows: mx.array, position: mx.array) -> mx.array:
    """Take rows [N, T] at positions [N, A, K]."""
    flat = mx.take_along_axis(rows, position.flatten(1), axis=1)
    return flat.reshape(position.shape)


class _Joined:
    """A layer's context keys and values, to which a pass adds its blocks' own."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self._keys, self._values = keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return (
            mx.concatenate([self._keys, keys], axis=2),
            mx.concatenate([self._values, values], axis=2),
        )


def block_mask(anchors: mx.array, size: int, length: int) -> mx.array:
    """Let each block see the context before its anchor, and itself.

    Args:
        anchors: [N, A] positions.
        size: slots of a block, K.
        length: context positions, T.

    Returns:
        [N, 1, A*K, T + A*K] bool.
    """
    rows, count = anchors.shape
    before = mx.arange(length) < mx.repeat(anchors, size, axis=1)[..., None]
    block = mx.repeat(mx.arange(count), size)
    own = mx.broadcast_to(block[:, None] == block, (rows, count * size, count * size))
    return mx.concatenate([before, own], axis=-1)[:, None]


def block_hidden(
    drafter: DSparkDrafter, features: mx.array, tokens: mx.array, anchors: mx.array
) -> mx.array:
    """Run the blocks of all anchors [N, A] at once; returns [N, A, K, E]."""
    size, (rows, count) = drafter.block_size, anchors.shape
    fused, start = drafter.fuse(features), mx.zeros((rows, 1), mx.int32)
    context = [_Joined(*layer.keys_values(fused, start)) for layer in drafter.layers]
    first = mx.take_along_axis(tokens, anchors, axis=1)[..., None]
    masks = mx.full((rows, count, size - 1), drafter.config.mask_token_id, first.dtype)
    block = mx.concatenate([first, masks], axis=-1).flatten(1)
    mask = block_mask(anchors, size, tokens.shape[1])
    hidden = drafter.block_hidden(block, context, anchors, mask)
    return hidden.reshape(rows, count, size, -1)


def teacher_forced(
    drafter: DSparkDrafter, teacher: Teacher, tokens: mx.array, blocks: Blocks
) -> Drafts:
    """Draft every slot with the true token before it."""
    hidden = block_hidden(drafter, teacher.features, tokens, blocks.anchors)
    logits, head = drafter.base_logits(hidden), drafter.markov_head
    if head is None:
        return Drafts(logits, drafter.confidence(hidden, None))
    anchor = mx.take_along_axis(tokens, blocks.anchors, axis=1)[..., None]
    embedding = head.embed(mx.concatenate([anchor, blocks.labels[..., :-1]], axis=-1))
    state, biases = None, []
    for k in range(drafter.block_size):
        bias, state = head.bias(embedding[:, :, k], hidden[:, :, k], state)
        biases.append(bias)
    return Drafts(logits + mx.stack(biases, axis=2), drafter.confidence(hidden, embedding))


def teacher_logits(drafter: DSparkDrafter, teacher: Teacher, blocks: Blocks) -> mx.array:
    """Compute the target's logits for every slot, through the drafter's frozen head.

    Returns:
        [N, A, K, V]; slot k comes from the target's state at anchor + k.
    """
    rows, count, size = blocks.labels.shape
    position = blocks.anchors[..., None] + mx.arange(size)
    position = mx.minimum(position, teacher.last_hidden.shape[1] - 1).reshape(rows, -1, 1)
    hidden = mx.take_along_axis(teacher.last_hidden, position, axis=1)
    return drafter.base_logits(hidden).reshape(rows, count, size, -1)


def draft_loss(
    drafts: Drafts, target_logits: mx.array, blocks: Blocks, mix: LossMix
) -> tuple[mx.array, ...]:
    """Mix the three terms, each averaged over the slots that count.

    Returns:
        The loss, the cross entropy, the L1 distance, and the confidence's binary cross entropy.
    """
    slot = mx.exp(-mx.arange(blocks.labels.shape[-1]) / mix.decay)
    weight = slot * blocks.counts
    total = weight.sum() + TINY
    logits = drafts.logits.astype(mx.float32)
    q, p = mx.softmax(logits, axis=-1), mx.softmax(target_logits.astype(mx.float32), axis=-1)
    distance = mx.abs(q - p).sum(axis=-1)
    entropy = (nn.losses.cross_entropy(logits, blocks.labels) * weight).sum() / total
    variation = (distance * weight).sum() / total
    doubt = mx.zeros(())
    if drafts.confidence is not None:
        accept = mx.stop_gradient(mx.clip(1 - distance / 2, 0, 1))
        each = nn.losses.binary_cross_entropy(drafts.confidence, accept, reduction="none")
        doubt = (each * weight).sum() / total
    loss = mix.cross_entropy * entropy + mix.total_variation * variation + mix.confidence * doubt
    return loss, entropy, variation, doubt


class TappedTarget:
    """A frozen target that tells what it knew at every position of a text."""

    def __init__(self, model: nn.Module, layer_ids: tuple[int, ...]) -> None:
        self._inner, self._taps = model.model, Taps(model.layers, layer_ids)

    def __call__(self, tokens: mx.array) -> Teacher:
        """Read tokens [N, T]."""
        last_hidden = self._inner(tokens)
        return Teacher(mx.stop_gradient(self._taps.take()), mx.stop_gradient(last_hidden))


def freeze_shared(drafter: DSparkDrafter, embedding: mx.array, head: mx.array) -> None:
    """Copy the target's embedding and head [V, E] into the drafter, and freeze them."""
    drafter.embed_tokens.weight, drafter.lm_head.weight = embedding, head
    drafter.embed_tokens.freeze()
    drafter.lm_head.freeze()


def train_drafter(
    drafter: DSparkDrafter,
    target: TappedTarget,
    batches: Iterable[Answers],
    mix: LossMix,
    schedule: Schedule,
    *,
    num_anchors: int,
) -> None:
    """Train in place, one step for each batch; anchors are drawn anew every time."""

    def loss(tokens: mx.array, answers: mx.array, key: mx.array) -> tuple[mx.array, ...]:
        anchors, kept = draw_anchors(answers, num_anchors, key)
        blocks = make_blocks(Answers(tokens, answers), anchors, kept, drafter.block_size)
        teacher = target(tokens)
        drafts = teacher_forced(drafter, teacher, tokens, blocks)
        return draft_loss(drafts, teacher_logits(drafter, teacher, blocks), blocks, mix)

    trainer, start = Trainer(drafter, loss, schedule), time.perf_counter()
    key = mx.random.key(schedule.seed)
    for number, batch in enumerate(batches, 1):
        key, own = mx.random.split(key)
        values = trainer.step(batch.tokens, batch.answers, own)
        if number % LOG_EVERY == 0 or number == schedule.steps:
            _log(number, values, time.perf_counter() - start)
    trainer.finish()


def _log(number: int, values: tuple[mx.array, ...], elapsed_s: float) -> None:
    loss, entropy, variation, doubt = (value.item() for value in values)
    print(
        f"drafter step {number} loss {loss:.4f} cross entropy {entropy:.4f} L1 {variation:.4f} "
        f"confidence {doubt:.4f} {elapsed_s:.0f} s",
        flush=True,
    )
