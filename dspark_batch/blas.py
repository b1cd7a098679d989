"""Loads OpenBLAS before MLX on Linux: import this before anything that imports MLX.

The Linux CPU wheel of MLX bundles the reference BLAS (about 3 GFLOPS). Symbols that are already
global win over the bundled ones, so an OpenBLAS loaded first is 20 to 50 times faster.
"""

import ctypes
import os
import sys
from typing import Literal

# 64-bit-index builds have other symbol names and are of no use here.
_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")


def load() -> Literal["openblas", "bundled"]:
    """Load OpenBLAS for MLX if the system has it, and say which BLAS MLX will use.

    `DSPARK_BATCH_BLAS=bundled` keeps the wheel's own, and so does whoever imports MLX first.
    """
    if "mlx.core" in sys.modules:
        return "bundled"
    if sys.platform != "linux" or os.environ.get("DSPARK_BATCH_BLAS") == "bundled":
        return "bundled"
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return "openblas"
    return "bundled"


ACTIVE = load()
