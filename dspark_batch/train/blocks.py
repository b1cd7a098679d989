"""Block drafting from random anchors of the target's own answers, the true tokens given.

Source:
    DSpark, section on training, and DeepSpec's trainer: anchors, masks, labels.
"""

from typing import NamedTuple

import mlx.core as mx

from dspark_batch.drafters.dspark import DSparkDrafter


class Answers(NamedTuple):
    """N prompts with the target's answers, padded to the same length."""

    tokens: mx.array  # [N, T] int32
    answers: mx.array  # [N, T] bool, tokens of an answer, its end marker included


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
    fused, start = drafter.fuse(features), mx.zeros(rows, mx.int32)
    context = [_Joined(*layer.keys_values(fused, start)) for layer in drafter.layers]
    first = mx.take_along_axis(tokens, anchors, axis=1)[..., None]
    masks = mx.full((rows, count, size - 1), drafter.config.mask_token_id, first.dtype)
    block = mx.concatenate([first, masks], axis=-1).flatten(1)
    mask = block_mask(anchors, size, tokens.shape[1])
    hidden = drafter.block_hidden(block, context, anchors, mask)
    return hidden.reshape(rows, count, size, -1)


def teacher_forced(
    drafter: DSparkDrafter, features: mx.array, tokens: mx.array, blocks: Blocks
) -> Drafts:
    """Draft every slot with the true token before it.

    Args:
        drafter: in training.
        features: [N, T, m*E], the target's tapped outputs.
        tokens: [N, T].
        blocks: of these rows.
    """
    hidden = block_hidden(drafter, features, tokens, blocks.anchors)
    logits, head = drafter.base_logits(hidden), drafter.markov_head
    if head is None:
        return Drafts(logits, drafter.confidence(hidden, None))
    anchor = mx.take_along_axis(tokens, blocks.anchors, axis=1)[..., None]
    embedding = head.embed(mx.concatenate([anchor, blocks.labels[..., :-1]], axis=-1))
    return Drafts(logits + head.biases(embedding, hidden), drafter.confidence(hidden, embedding))


def slot_positions(blocks: Blocks, length: int) -> mx.array:
    """Say where the target predicts what each slot drafts: slot k at anchor + k.

    Args:
        blocks: A anchors in each of N rows.
        length: of a row.

    Returns:
        [N, A*K] int32.
    """
    position = blocks.anchors[..., None] + mx.arange(blocks.labels.shape[-1])
    return mx.minimum(position, length - 1).flatten(1)
