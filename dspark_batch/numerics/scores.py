"""Log-probabilities of tokens that were chosen, and of the likeliest ones beside them."""

from typing import NamedTuple

import mlx.core as mx

from dspark_batch.types import MOST_LOGPROBS


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
        num_top: K, how many of the likeliest tokens are scored too.
    """
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[..., None], axis=-1) - total
    if num_top == 0:
        nothing = mx.zeros((*tokens.shape, 0))
        return Scores(chosen[..., 0], nothing.astype(mx.int32), nothing)
    ids = _likeliest(logits)
    top = mx.take_along_axis(logits, ids, axis=-1) - total
    order = mx.argsort(-top, axis=-1)[..., :num_top]
    ids, top = (mx.take_along_axis(each, order, axis=-1) for each in (ids, top))
    return Scores(chosen[..., 0], ids.astype(mx.int32), top)


def _likeliest(logits: mx.array) -> mx.array:
    """Find the ids of the likeliest tokens, ascending.

    Always as many as anybody may ask for: which of several equal ones belong to them must not
    depend on what a neighbour asked.
    """
    least = max(0, logits.shape[-1] - MOST_LOGPROBS)
    return mx.sort(mx.argpartition(logits, least, axis=-1)[..., least:], axis=-1)
