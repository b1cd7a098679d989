"""Lets the cache of a step say which attention runs, without copying a model's forward pass."""

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from dspark_batch.models import gemma2, mla
from dspark_batch.numerics.attention import ragged_attention

_NAME = scaled_dot_product_attention.__name__
# The cache that gave the keys of a step, by the identity of these, for as long as they are there.
_caches: dict[int, tuple[ref[mx.array], ref[Any]]] = {}
# Of families whose own code cannot attend over slots of different lengths.
_FORWARDS = gemma2.FORWARDS | mla.FORWARDS  # class of an attention module -> its pass


def let_caches_choose(model: nn.Module) -> None:
    """Make a model's attention ours where the cache of a step is ragged.

    Each attention module keeps its parameters and its place; its class becomes a one-off subclass
    whose forward pass is the model's own code, with one global name bound to our function. Other
    users of the same classes, and steps over other caches, notice nothing.
    """
    for module in model.modules():
        if type(module) in _FORWARDS:
            module.__class__ = _replaced(type(module), _FORWARDS[type(module)])
            continue
        code = getattr(type(module).__call__, "__code__", None)  # None: not written in Python
        if code is not None and _NAME in code.co_names:
            module.__class__ = rebound(type(module), _NAME, partial(attend, is_causal=True))


def attend(  # noqa: PLR0913  the names that mlx-lm's models call it with
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,  # noqa: ANN401  ours, or one of many of mlx-lm's
    scale: float,
    mask: Any,  # noqa: ANN401  an array, or a word that mlx-lm knows
    sinks: mx.array | None = None,
    is_causal: bool = False,
) -> mx.array:
    """Attend as mlx-lm does, or over a ragged cache by `ragged_attention`.

    A layer without a cache may read the keys and values of another layer, as the last ones of
    Gemma 4 do: it attends as that one does.

    Raises:
        ValueError: a mask of a step over a ragged cache says something else than what is visible.
    """
    if cache is None:
        cache = _cache_of(keys)
    if getattr(cache, "is_ragged", False):
        _remember(keys, cache)
        if not isinstance(mask, mx.array) or mask.dtype != mx.bool_:
            raise ValueError("its attention has a mask of its own")
        beginning, keys, values = cache.split(keys, values)
        if (unseen := mask.shape[3] - cache.num_seen) > 0:
            keys, values = keys[:, :, :-unseen], values[:, :, :-unseen]
            mask = mask[..., :-unseen]
        where = (keys, values, scale, mask, cache.lengths)
        more = {"is_causal": is_causal, "sinks": sinks, "beginning": beginning}
        return cache.packed(ragged_attention(cache.unpacked(queries), *where, **more))
    return scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
    )


def _remember(keys: mx.array, cache: object) -> None:
    name = id(keys)
    _caches[name] = ref(keys, lambda _: _caches.pop(name, None)), ref(cache)


def _cache_of(keys: mx.array) -> Any:  # noqa: ANN401  ours
    """Find the ragged cache that gave keys; None: none did."""
    found = _caches.get(id(keys))
    return found[1]() if found is not None and found[0]() is keys else None


def _replaced(plain: type, forward: Callable[..., mx.array]) -> type:
    """Make a subclass that runs another pass over ragged caches, and its own over others."""

    def call(
        self: nn.Module, x: mx.array, mask: mx.array | None = None, cache: object = None
    ) -> mx.array:
        if getattr(cache, "is_ragged", False):
            return forward(self, x, mask, cache)
        return plain.__call__(self, x, mask, cache)

    return type(plain.__name__, (plain,), {"__call__": call})


def rebound(plain: type, name: str, function: Callable[..., mx.array]) -> type:
    """Make a subclass whose forward pass is the same code, with another function of a name."""
    call: Any = plain.__call__  # to its stub a method of `type`
    forward = with_names(call, {name: function})
    return type(plain.__name__, (plain,), {"__call__": forward})


def with_names(method: FunctionType, names: Mapping[str, object]) -> FunctionType:
    """Copy a function, whose code then finds other objects under some global names."""
    found = {**method.__globals__, **names}
    copy = FunctionType(method.__code__, found, method.__name__, None, method.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = method.__defaults__, method.__kwdefaults__
    return copy
