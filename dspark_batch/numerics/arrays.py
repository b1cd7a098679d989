"""What MLX's stubs leave open, under the types that it has."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def named_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """List the parameters of a module by their names."""
    named: Any = tree_flatten(module.parameters())  # a mapping only for who asks for one
    return list(named)
