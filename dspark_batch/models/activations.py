"""Gives a target's MLPs a faster activation on a CPU, without copying their code."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from dspark_batch import device
from dspark_batch.models.attention import rebound
from dspark_batch.numerics import exponential
from dspark_batch.numerics.rows import are_as_they_come

_NAME = "swiglu"


def make_activations_fast(model: nn.Module) -> None:
    """Replace mlx-lm's `swiglu` in every module of a model that calls it, on a CPU.

    A module keeps its parameters and its place. mlx-lm's own passes compute what they computed.
    """
    if not device.is_cpu():
        return
    for module in model.modules():
        call = type(module).__call__
        code = getattr(call, "__code__", None)  # None: not written in Python
        if code is None or _NAME not in code.co_names:
            continue
        if call.__globals__[_NAME] is activations.swiglu:
            module.__class__ = rebound(type(module), _NAME, swiglu)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Activate [..., N] as mlx-lm does; in passes of ours by a faster exponential."""
    if are_as_they_come():
        return activations.swiglu(gate, up)
    return exponential.swiglu(gate, up)
