"""Attention with the query heads of a KV group folded into rows; put in place by a class swap."""

from contextlib import contextmanager
from types import FunctionType, SimpleNamespace

import mlx.core as mx


def folded_attention(queries, keys, values, cache=None, *, scale, mask):
    """Attend from [S, H, W, D] to [S, KV, C, D]; takes what mlx-lm's models pass.

    The mask is bool and broadcasts to [S, 1, W, C]; None or "causal" where all of C was written by
    this step. A folded row belongs to one head and one token, so no mask is repeated by head.
    """
    slots, heads, width, dim = queries.shape
    kv_heads, keys_len = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    rows = (queries * scale).reshape(slots, kv_heads, group * width, dim)
    scores = rows @ keys.swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = mx.arange(keys_len) <= mx.arange(keys_len - width, keys_len)[:, None]
        mask = mask[None, None]
    if mask is not None:
        scores = scores.reshape(slots, kv_heads, group, width, keys_len)
        scores = mx.where(mask[:, :, None], scores, mx.finfo(scores.dtype).min)
        scores = scores.reshape(slots, kv_heads, group * width, keys_len)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ values).reshape(slots, heads, width, dim)


@contextmanager
def folded(model, drafter):
    """Let an mlx-lm model and a drafter attend so, for a while."""
    name = "scaled_dot_product_attention"
    fast = SimpleNamespace(**{name: folded_attention})
    target_names, draft_names = {name: folded_attention}, {"mx": SimpleNamespace(fast=fast)}
    with (
        _swapped([layer.self_attn for layer in model.layers], target_names),
        _swapped([layer.self_attn for layer in drafter.layers], draft_names),
    ):
        yield


@contextmanager
def _swapped(modules, names):
    """Give modules their own forward pass with some of its global names replaced."""
    plain = type(modules[0])
    swapped = type(plain.__name__, (plain,), {"__call__": _rebound(plain.__call__, names)})
    for module in modules:
        module.__class__ = swapped
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = plain


def _rebound(function, names):
    around = {**function.__globals__, **names}
    rebound = FunctionType(
        function.__code__, around, function.__name__, function.__defaults__, function.__closure__
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound
