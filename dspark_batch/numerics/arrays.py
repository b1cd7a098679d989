"""What MLX's stubs leave open, under the types that it has."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Kernel: TypeAlias = Callable[..., list[mx.array]]


def cuda_kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], *, header: str, source: str
) -> Kernel:
    """Give a kernel of ours to MLX, which compiles it when it runs first; see `mx.fast`."""
    made: Any = mx.fast.cuda_kernel(
        name=name, input_names=inputs, output_names=outputs, header=header, source=source
    )
    kernel: Kernel = made
    return kernel


def named_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """List the parameters of a module by their names."""
    named: Any = tree_flatten(module.parameters())  # a mapping only for who asks for one
    return list(named)
