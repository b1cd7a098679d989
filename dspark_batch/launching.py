"""How MLX hands kernels to CUDA, said before MLX is imported; it reads this when it runs first.

Each kernel by itself, not as graphs that it makes anew for every pass, and without an end after
every matrix of a large target.
"""

import os
import sys

IS_IN_TIME = "mlx.core" not in sys.modules  # else MLX may have read it already

if sys.platform != "darwin":
    os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100000")


def is_one_by_one() -> bool:
    """Whether MLX surely hands each kernel to CUDA by itself, in the order of their launches."""
    return IS_IN_TIME and os.environ.get("MLX_USE_CUDA_GRAPHS") == "0"
