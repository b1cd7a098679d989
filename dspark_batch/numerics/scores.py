"""Log-probabilities of tokens that were chosen, and of the likeliest ones beside them."""

from typing import NamedTuple

import mlx.core as mx


class Scores(NamedTuple):
    """What the target thought of W tokens of each slot; natural logarithms."""

    chosen: mx.array  # [B, W] float32
    top_ids: mx.array  # [B, W, K] int32, the likeliest first; of equal ones the lower id
    top: mx.array  # [B, W, K] float32


def score(logits: mx.array, tokens: mx.array, num_top: int) -> Scores:
    """Score tokens [B, W] by the target's logits [B, W, V], as they are before any sampling.

    Args:
        logits: row i decides token i.
        tokens: int32.
        num_top: K, how many of the likeliest tokens are scored too; at most V.
    """
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    if num_top == 0:
        nothing = mx.zeros((*tokens.shape, 0))
        return Scores(chosen, nothing.astype(mx.int32), nothing)
    ids = mx.sort(mx.argpartition(-logprobs, num_top - 1, axis=-1)[..., :num_top], axis=-1)
    top = mx.take_along_axis(logprobs, ids, axis=-1)
    order = mx.argsort(-top, axis=-1)
    in_order = (mx.take_along_axis(each, order, axis=-1) for each in (ids, top))
    ids, top = in_order
    return Scores(chosen, ids.astype(mx.int32), top)
