"""The machine: which device computes, asked here and nowhere else; where things are kept on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import mlx.core as mx

from dspark_batch import launching
from dspark_batch.errors import UsageError

_begins = ContextVar("begins", default=False)  # whether `begun` begins, in a thread


def is_cpu() -> bool:
    """Whether the processor computes, which is the host itself."""
    return mx.default_device() == mx.Device(mx.cpu)


def is_gpu() -> bool:
    """Whether a GPU computes: Apple's by Metal, or NVIDIA's by CUDA."""
    return mx.default_device() == mx.Device(mx.gpu)


def is_metal() -> bool:
    """Whether an Apple GPU computes."""
    return is_gpu() and mx.metal.is_available()


def is_cuda() -> bool:
    """Whether an NVIDIA GPU computes."""
    return is_gpu() and mx.cuda.is_available()


def launches_one_by_one() -> bool:
    """Whether kernels surely run in the order in which MLX launches them; see `launching`."""
    return is_cuda() and launching.is_one_by_one()


@contextmanager
def computing_at_once() -> Iterator[None]:
    """Let `begun` begin. Not around what is differentiated or compiled: nothing can begin there."""
    before = _begins.set(True)
    try:
        yield
    finally:
        _begins.reset(before)


def begun(array: mx.array) -> mx.array:
    """Let the device compute an array while the host says what comes behind it; return it.

    For a CPU. MLX computes in a thread of its own, which would wait until a whole pass is said.
    """
    if _begins.get():
        mx.async_eval(array)
    return array


def num_cores() -> int:
    """Count the processor's cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux; a container may have fewer than the machine
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_memory_free() -> None:
    """Let MLX hold back no more than an eighth of an NVIDIA GPU's memory for arrays to come.

    Else it holds back all that was ever used. Where the GPU is full, MLX 0.32 gives some of it back
    for each new array, and that waits for what the GPU is doing.
    """
    if is_cuda():
        most = int(mx.device_info()["total_memory"]) // 8
        mx.set_cache_limit(min(most, mx.set_cache_limit(most)))


def cache_folder() -> Path:
    """Name the folder where this program keeps what it learned about machines and pairs.

    Raises:
        UsageError: nobody has said where that is.
    """
    named = os.environ.get("DSPARK_BATCH_CACHE")
    try:
        return Path(named) if named else Path.home() / ".cache" / "dspark-batch"
    except RuntimeError as error:
        raise UsageError(
            "this user has no home folder, and HOME is not set. Name a folder for what is kept "
            "between runs in DSPARK_BATCH_CACHE."
        ) from error


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache folder whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError:
        with suppress(OSError):  # a full disk would have one of each start
            draft.unlink()
        raise
