"""Lets the cache of a step record what recurrent layers read, without copying a forward pass."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import compute_g, compute_lower_bound_g, gated_delta_update
from mlx_lm.models.ssm import compute_dt, ssm_update

from dspark_batch.caches.states import Recurrence, StateCache
from dspark_batch.models.attention import with_names
from dspark_batch.numerics.recurrence import gated_delta, state_space


class Recurrent(NamedTuple):
    """A kind of layer that remembers a window of its convolution's input, and maybe a state."""

    window: int
    recurrence: Recurrence | None  # None: only the window

    @property
    def num_arrays(self) -> int:
        """How many arrays mlx-lm keeps of such a layer."""
        return 1 if self.recurrence is None else 2


def recurrent_layers(model: nn.Module) -> list[Recurrent]:
    """List the recurrent layers of a model that we know how to record, in order."""
    return [_kind_of(module) for _, module in _mixers(model)]


def let_caches_record(model: nn.Module) -> None:
    """Make recurrent layers tell a `StateCache` what they convolve, and recur as it says.

    Each one keeps its parameters and its place. Its class becomes a one-off subclass whose methods
    are the model's own code, with one global name bound to our function. Steps over other caches
    notice nothing.
    """
    for name, module in _mixers(model):
        if not _is_recorded(module):
            _record(module, name)


class _Step:
    """The step that a layer runs right now."""

    cache: StateCache | None = None  # None: it runs over a cache that is not ours


def _mixers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List modules with one convolution of their own, by its name there."""
    found = []
    for layer in model.layers:
        for module in layer.modules():
            names = [name for name, child in module.children().items() if _is_convolution(child)]
            if len(names) == 1:
                found.append((names[0], module))
    return found


def _is_convolution(module: object) -> bool:
    return isinstance(module, nn.Conv1d) and module.groups == module.weight.shape[0]


def _is_recorded(module: nn.Module) -> bool:
    return hasattr(type(module), _KIND)


def _kind_of(module: nn.Module) -> Recurrent:
    if _is_recorded(module):
        return getattr(type(module), _KIND)
    (convolution,) = filter(_is_convolution, module.children().values())
    names = [name for name in _UPDATES if _methods_that_use(type(module), name)]
    recurrence = _UPDATES[names[0]].recurrence if names else None
    return Recurrent(convolution.weight.shape[1] - 1, recurrence)


def _methods_that_use(kind: type, name: str) -> list[str]:
    """List the methods of a class whose code uses a global name."""
    methods = ((m, getattr(kind, m)) for m in dir(kind) if not hasattr(nn.Module, m) or m == _CALL)
    codes = ((m, getattr(method, "__code__", None)) for m, method in methods)
    return [m for m, code in codes if code is not None and name in code.co_names]


_CALL, _KIND = "__call__", "recurrent_kind"


def _record(module: nn.Module, convolution: str) -> None:
    step, plain, kind = _Step(), type(module), _kind_of(module)
    changed = {
        method: with_names(getattr(plain, method), {name: partial(update.run, step)})
        for name, update in _UPDATES.items()
        for method in _methods_that_use(plain, name)
    }
    forward = changed.get(_CALL, plain.__call__)

    def call(self: nn.Module, *args: object, **kwargs: object) -> mx.array:
        given = (*args, *kwargs.values())
        step.cache = next((each for each in given if isinstance(each, StateCache)), None)
        try:
            return forward(self, *args, **kwargs)
        finally:
            step.cache = None  # or the layer would hold its states for ever

    module.__class__ = type(plain.__name__, (plain,), {**changed, _CALL: call, _KIND: kind})
    inner = module[convolution]
    inner.__class__ = _recording(type(inner), step)


def _recording(plain: type, step: _Step) -> type:
    def call(self: nn.Module, inputs: mx.array) -> mx.array:
        if step.cache is not None:
            step.cache.convolve(inputs)
        return plain.__call__(self, inputs)

    return type(plain.__name__, (plain,), {_CALL: call})


def _gated_delta(  # noqa: PLR0913  the names that mlx-lm's models call it with
    step: _Step,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """Do what mlx-lm's `gated_delta_update` does, over a step's own cache."""
    if step.cache is None:
        update = partial(gated_delta_update, use_kernel=use_kernel, lower_bound=lower_bound)
        first = (q, k, v, a, b, A_log, dt_bias, state, mask)
        return update(*first, allow_neg_eigval=allow_neg_eigval)
    strength = mx.sigmoid(b) * 2.0 if allow_neg_eigval else mx.sigmoid(b)
    if lower_bound is None:
        decay = compute_g(A_log, a, dt_bias)
    else:
        decay = compute_lower_bound_g(A_log, a, dt_bias, lower_bound)
    return step.cache.update([q, k, v, decay, strength])


def _state_space(  # noqa: PLR0913  the names that mlx-lm's models call it with
    step: _Step,
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Do what mlx-lm's `ssm_update` does, over a step's own cache."""
    if step.cache is None:
        first = (hidden_states, A_log, B, C, D, dt, dt_bias, state, time_step_limit)
        return ssm_update(*first, mask, lengths)
    dt = compute_dt(dt, dt_bias, time_step_limit)
    decay = mx.exp(dt * -mx.exp(A_log).astype(dt.dtype))
    outputs, state = step.cache.update([C, B, dt[..., None] * hidden_states, decay])
    return outputs.astype(hidden_states.dtype) + hidden_states * D[:, None], state


class _Update(NamedTuple):
    """What stands for a function of mlx-lm."""

    run: Callable[..., tuple[mx.array, mx.array]]
    recurrence: Recurrence


_UPDATES = {
    gated_delta_update.__name__: _Update(_gated_delta, gated_delta),
    ssm_update.__name__: _Update(_state_space, state_space),
}
