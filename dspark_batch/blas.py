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


def hint() -> str | None:
    """Say what would make this Linux CPU faster; None: nothing, or the user wants it so."""
    is_chosen = os.environ.get("DSPARK_BATCH_BLAS") == "bundled"
    if sys.platform != "linux" or ACTIVE == "openblas" or is_chosen:
        return None
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.cpu):
        return None
    return (
        "MLX computes with its own BLAS here, the slow reference one. Install OpenBLAS "
        "(apt install libopenblas0-pthread), and in Python import dspark_batch before mlx."
    )
