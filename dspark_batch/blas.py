"""Gives MLX a fast BLAS on a Linux CPU: import this before anything that imports MLX.

The Linux CPU wheel of MLX bundles the reference BLAS (about 3 GFLOPS). Symbols that are already
global win over the bundled ones, so an OpenBLAS that is loaded first is 20 to 50 times faster.

`DSPARK_BATCH_BLAS` chooses:

    (not set), auto   the pip package scipy-openblas32 (extra [cpu]), or else the system's OpenBLAS
    system            the distribution's OpenBLAS (libopenblas.so.0)
    bundled           what MLX brings itself
    a path            that library: an OpenBLAS, or another BLAS with 32-bit integers

What cannot be loaded leaves MLX its own, and `hint` says what to do. The number of threads decides
bits with some kernels, so a rule fixes it and no measurement: one, or `OPENBLAS_NUM_THREADS`.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

# 64-bit-index builds have other symbol names and are of no use here.
_SYSTEM = ("libopenblas.so.0", "libopenblas.so")
_PACKAGE = "scipy_openblas32"
_PREFIX = "scipy_"  # the package's functions are called scipy_cblas_sgemm, ...
# What MLX asks for (`nm -D libmlx.so`).
_GEMM = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_LAPACK = (
    *("cgeev_", "cgesdd_", "cheevd_", "dgeev_", "dgeqrf_", "dgesdd_", "dgetrf_", "dgetri_"),
    *("dorgqr_", "dpotrf_", "dsyevd_", "dtrtri_", "sgeev_", "sgeqrf_", "sgesdd_", "sgetrf_"),
    *("sgetri_", "sorgqr_", "spotrf_", "ssyevd_", "strtri_"),
)
_CONTROL = tuple(
    f"openblas_{name}"
    for name in ("get_config", "get_corename", "get_num_threads", "set_num_threads")
)
_GLOBAL_FUNCTION, _SHN_ABS = 0x12, 0xFFF1
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_TOO_LATE = "mlx was imported before dspark_batch"
_INSTALL = "pip install 'dspark-batch[cpu]', or apt install libopenblas0-pthread"


class _Unusable(Exception):
    """A library does not serve MLX; the message says why."""


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS that MLX uses in this process."""

    kind: Literal["openblas", "other", "bundled"]
    why: str  # it is this one
    library: ctypes.CDLL | None = None  # None: what MLX brings itself


def load() -> Blas:
    """Load the BLAS that `DSPARK_BATCH_BLAS` chooses, and say which one MLX will use."""
    chosen = os.environ.get("DSPARK_BATCH_BLAS", "") or "auto"
    if sys.platform != "linux":
        return Blas("bundled", "only Linux needs another one")
    if "mlx.core" in sys.modules:
        return Blas("bundled", _TOO_LATE)
    process = ctypes.CDLL(None)
    if hasattr(process, _GEMM[0]):  # first in order, so it wins whatever we load
        return _described(process, "it was in this process before")
    if chosen == "bundled":
        return Blas("bundled", "DSPARK_BATCH_BLAS chose it")
    return _first_that_loads(chosen)


def _first_that_loads(chosen: str) -> Blas:
    failed = []
    for path, why in _candidates(chosen).items():
        try:
            library = _load_globally(path)
        except (OSError, _Unusable) as error:
            failed += _told(path, str(error))
        else:
            return _described(library, "; ".join([why, *failed]))
    return Blas("bundled", "; ".join(failed) or "no OpenBLAS is installed")


def _told(path: str, error: str) -> list[str]:
    """Word an error, unless it is that the system has no OpenBLAS."""
    if path in _SYSTEM and error.startswith(f"{path}: cannot open"):
        return []
    return [error if path in error else f"{path}: {error}"]


def _candidates(chosen: str) -> Mapping[str, str]:
    """Name libraries, best first, each with why it would be the one."""
    by_choice = "DSPARK_BATCH_BLAS chose it"
    if chosen == "system":
        return dict.fromkeys(_SYSTEM, by_choice)
    if chosen != "auto":
        return {chosen: by_choice}
    return dict.fromkeys(_packaged(), f"{_PACKAGE} is installed") | dict.fromkeys(
        _SYSTEM, "the system has it"
    )


def _packaged() -> list[str]:
    package = find_spec(_PACKAGE)  # importing it would load it too, for everybody
    folders = (package and package.submodule_search_locations) or ()
    return [str(file) for folder in folders for file in Path(folder, "lib").glob("libscipy_*.so")]


def _load_globally(path: str) -> ctypes.CDLL:
    """Load a library so that MLX finds its functions, also if their names have a prefix.

    Raises:
        OSError: it cannot be loaded.
        _Unusable: MLX cannot use it.
    """
    library = ctypes.CDLL(path)
    if not hasattr(library, _GEMM[0]):
        library = _with_plain_names(library)
    if "USE64BITINT" in _text(library, "openblas_get_config"):
        raise _Unusable("its integers have 64 bits, expected 32")
    ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL)
    return library


def _described(library: ctypes.CDLL, why: str) -> Blas:
    if not hasattr(library, "openblas_get_config"):
        return Blas("other", why, library)
    library.openblas_set_num_threads(_num_threads_by_rule())
    return Blas("openblas", why, library)


def _num_threads_by_rule() -> int:
    named = os.environ.get("OPENBLAS_NUM_THREADS", "")
    return int(named) if named.isdecimal() and int(named) else 1


def _text(library: ctypes.CDLL, function: str) -> str:
    """Call a function that returns a text; "": the library has none of that name."""
    if not hasattr(library, function):
        return ""
    getattr(library, function).restype = ctypes.c_char_p
    return getattr(library, function)().decode(errors="replace").strip()


def _with_plain_names(library: ctypes.CDLL) -> ctypes.CDLL:
    """Load a library of some KB, in memory, with nothing but plain names for loaded functions.

    So there is no patched copy of the other one, no tool to patch it, and no file to trust.
    """
    addresses = {
        name: _address(library, _PREFIX + name)
        for name in (*_GEMM, *_LAPACK, *_CONTROL)
        if hasattr(library, _PREFIX + name)
    }
    if _GEMM[0] not in addresses:
        raise _Unusable(f"it has no {_GEMM[0]}")
    names = ctypes.CDLL(_in_memory(names_library(addresses)))
    for name, address in addresses.items():
        if _address(names, name) != address:  # before glibc 2.28
            raise _Unusable(f"the loader misplaces {name}")
    return names


def _in_memory(content: bytes) -> str:
    """Write a file that is nowhere on a disk, and name it."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Not os.memfd_create: a Python that was built for an old glibc has none.
    file = libc.memfd_create(b"dspark-batch-blas", 1)  # closed in a child
    if file < 0:
        raise OSError(ctypes.get_errno(), "no file in memory (memfd_create)")
    os.write(file, content)
    return f"/proc/self/fd/{file}"  # stays open: the loader knows a library by its name


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def names_library(addresses: Mapping[str, int]) -> bytes:
    """Write a shared library (ELF, 64 bits) whose functions are at absolute addresses.

    Args:
        addresses: where each function is in this process, by its name.

    Source:
        System V ABI, chapters 4 and 5. The loader adds nothing to the address of an SHN_ABS symbol.
    """
    names = b"\0".join([b"", *(name.encode() for name in addresses), b""])
    symbols, name_at = bytes(24), 1
    for name, address in addresses.items():
        symbols += struct.pack("<IBBHQQ", name_at, _GLOBAL_FUNCTION, 0, _SHN_ABS, address, 0)
        name_at += len(name) + 1
    count = len(addresses) + 1
    # One bucket with all of them: so few names need no hash, each points at the one before.
    table = struct.pack(f"<{3 + count}I", 1, count, count - 1, 0, *range(count - 1))
    headers, dynamic = 64 + 3 * 56, 6 * 16
    symbols_at = headers + dynamic
    table_at = symbols_at + len(symbols)
    names_at = table_at + len(table)
    size = names_at + len(names)
    tags = (4, table_at, 5, names_at, 6, symbols_at, 10, len(names), 11, 24, 0, 0)
    return b"".join(
        (
            b"\x7fELF\2\1\1" + bytes(9),
            struct.pack("<HHIQQQIHHHHHH", 3, _machine(), 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0),
            _program_header(_PT_LOAD, 0, size, 1 << 16),
            _program_header(_PT_DYNAMIC, headers, dynamic, 8),
            _program_header(_PT_GNU_STACK, 0, 0, 16),  # without it the stack gets executable
            struct.pack("<12Q", *tags),
            symbols,
            table,
            names,
        )
    )


def _program_header(kind: int, start: int, size: int, align: int) -> bytes:
    read_and_write = 6
    return struct.pack("<IIQQQQQQ", kind, read_and_write, start, start, start, size, size, align)


def _machine() -> int:
    """Read for which processor this Python is, as ELF counts them."""
    with Path("/proc/self/exe").open("rb") as file:
        return int.from_bytes(file.read(20)[18:], "little")


LOADED = load()


def num_threads() -> int | None:
    """Say over how many threads a product goes; None: this BLAS does not tell."""
    if LOADED.library is None or LOADED.kind != "openblas":
        return None
    return int(LOADED.library.openblas_get_num_threads())


def set_num_threads(count: int | None) -> None:
    """Set what `num_threads` said in an earlier process, so that bits stay."""
    if count is not None and LOADED.library is not None and LOADED.kind == "openblas":
        LOADED.library.openblas_set_num_threads(count)


def identity() -> str:
    """Name all that decides the bits of a product: version, build, kernel and threads."""
    if LOADED.library is None:
        return "mlx's own"
    if LOADED.kind == "other":
        return _file_identity(LOADED.library)
    config, kernel = (_text(LOADED.library, f"openblas_get_{of}") for of in ("config", "corename"))
    return f"{config}, kernel {kernel}, threads {num_threads()}"


@cache
def _file_identity(library: ctypes.CDLL) -> str:
    """Name a library that tells nothing about itself by its file."""
    from hashlib import sha256

    path = _file_of(library)
    return f"{path.name}, sha256 {sha256(path.read_bytes()).hexdigest()}" if path else "unknown"


class _Place(ctypes.Structure):  # Dl_info
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("file_address", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(library: ctypes.CDLL) -> Path | None:
    place = _Place()
    ctypes.CDLL(None).dladdr(getattr(library, _GEMM[0]), ctypes.byref(place))
    path = Path(os.fsdecode(place.file or b""))
    return path if path.is_file() else None


def hint() -> str | None:
    """Say what would make this Linux CPU faster; None: nothing, or the user wants it so."""
    is_chosen = os.environ.get("DSPARK_BATCH_BLAS") == "bundled"
    if sys.platform != "linux" or LOADED.kind != "bundled" or is_chosen:
        return None
    from dspark_batch import device

    if not device.is_cpu():
        return None
    slow = f"MLX computes with its own BLAS here, the slow reference one: {LOADED.why}."
    if LOADED.why == _TOO_LATE:
        return f"{slow} Import dspark_batch first."
    if os.environ.get("DSPARK_BATCH_BLAS", "auto") not in ("", "auto", "system"):
        return f"{slow} Correct DSPARK_BATCH_BLAS, or unset it."
    return f"{slow} Install OpenBLAS: {_INSTALL}."
