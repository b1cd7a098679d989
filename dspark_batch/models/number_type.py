"""Which type of numbers a model computes in: a rule, so that a job has the same bytes each time."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from dspark_batch import device
from dspark_batch.numerics.arrays import named_arrays

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

_LARGE_BYTES = 2 << 30  # of stored weights; in float32 they would take twice as much memory


def usual_dtype(model: nn.Module, *, is_to_be_quantised: bool = False) -> str:
    """Choose float32 on a CPU, elsewhere the stored type.

    OpenBLAS multiplies float32 fastest, and MLX multiplies quantised weights with float32 scales
    many times as fast as with 16-bit ones. Large weights that are not quantised stay as they are.
    """
    weights = [array for _, array in named_arrays(model)]
    is_quantised = is_to_be_quantised or any(a.dtype == mx.uint32 for a in weights)
    is_large = sum(a.nbytes for a in weights) > _LARGE_BYTES
    is_cpu = device.is_cpu()
    return "float32" if is_cpu and (is_quantised or not is_large) else stored_dtype(model)


def set_dtype(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast a model's numbers, except for those that mlx-lm says must stay as they are stored."""
    may_cast = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, array: mx.array) -> mx.array:
        is_number = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if is_number and may_cast(name) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def stored_dtype(model: nn.Module) -> str:
    """Name the type of a model's numbers, or of their scales if it is quantised."""
    may_cast = getattr(model, "cast_predicate", lambda name: True)
    weights = (array for name, array in named_arrays(model) if may_cast(name))
    found = next(a.dtype for a in weights if mx.issubdtype(a.dtype, mx.floating))
    return str(found).removeprefix("mlx.core.")
