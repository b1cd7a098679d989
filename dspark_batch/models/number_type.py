"""Which type of numbers computes fastest here, by measurement."""

import time

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

_PROBE_WIDTH = 8  # a verify pass of one slot with block 7
_PROBE_STEPS = 5
_LARGEST_PROBE_BYTES = 2 << 30  # a larger model is not held twice for a probe


def fastest_dtype(model: nn.Module) -> str:
    """Choose between the stored type and float32.

    Only a CPU may gain by float32: with OpenBLAS it does, with MLX's own BLAS bfloat16 wins.
    Elsewhere, and for quantised or large weights, the stored type stays.
    """
    stored = stored_dtype(model)
    weights = [array for _, array in tree_flatten(model.parameters())]
    quantised = any(a.dtype == mx.uint32 for a in weights)
    large = sum(a.nbytes for a in weights) > _LARGEST_PROBE_BYTES
    if mx.default_device() != mx.Device(mx.cpu) or quantised or large:
        return stored
    seconds = {name: _step_s(model, DTYPES[name]) for name in (stored, "float32")}
    return min(seconds, key=seconds.__getitem__)


def stored_dtype(model: nn.Module) -> str:
    """Name the type of a model's numbers, or of their scales if it is quantised."""
    weights = (array for _, array in tree_flatten(model.parameters()))
    return _name(next(a.dtype for a in weights if mx.issubdtype(a.dtype, mx.floating)))


def _step_s(model: nn.Module, dtype: mx.Dtype) -> float:
    """Time a verify pass in another type, in seconds, and leave the model as it was."""
    before = model.parameters()
    model.set_dtype(dtype)
    tokens = mx.zeros((1, _PROBE_WIDTH), dtype=mx.int32)
    seconds = []
    for _ in range(_PROBE_STEPS):
        start = time.perf_counter()
        mx.eval(model(tokens))
        seconds.append(time.perf_counter() - start)
    model.update(before)
    return min(seconds)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
