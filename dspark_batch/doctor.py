"""Looks at this machine as a run would find it, and says what is wrong; asks no network."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dspark_batch import blas
from dspark_batch.errors import DsparkBatchError, UsageError
from dspark_batch.registry import RegisteredPair, list_pairs

_PACKAGES = (
    "dspark-batch",
    "mlx",
    "mlx-lm",
    "transformers",
    "huggingface_hub",
    "pyarrow",
    "llguidance",
)
_EXTRA = "pip install 'dspark-batch[cpu]', or [cuda13] for an NVIDIA GPU"
_MATMUL_SIZE = 1024
_MEASURE_S = 1.0  # of repeated products; one is always made
_MIN_FREE_BYTES = 1 << 30  # below this a run may not find room for its own rows


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found."""

    # section -> what it tells, by name
    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # what is wrong, and what to do
    hints: list[str] = field(default_factory=list)  # what works, but could be better

    @property
    def usable(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def diagnose() -> Diagnosis:
    """Look at Python, MLX, the device, memory, folders and the registered pairs."""
    found = Diagnosis()
    found.sections["software"] = _software()
    try:
        found.sections["compute"] = _compute()
    except (ImportError, RuntimeError) as error:
        what_to_do = _EXTRA if sys.platform == "linux" else "pip install --upgrade mlx"
        found.problems.append(f"MLX does not load ({error}). Install it: {what_to_do}.")
        return found
    if slow := blas.hint():
        found.hints.append(slow)
    found.sections["memory"] = _memory()
    found.sections["folders"] = _folders(found)
    found.sections["pairs"] = _pairs(found)
    return found


def forget() -> str:
    """Drop what is kept about this machine and others, and say what that was.

    No answer depends on it: the next run tests its products and learns its speed again.

    Raises:
        UsageError: it cannot be dropped.
    """
    from dspark_batch.tuning import kept

    try:
        number = kept.forget()
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be dropped ({error.strerror}).") from error
    return f"{number} file{'' if number == 1 else 's'} in {kept.folder()}"


def _software() -> dict[str, str]:
    versions = {"python": f"{platform.python_version()}, {platform.platform(terse=True)}"}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _compute() -> dict[str, str]:
    import mlx.core as mx

    from dspark_batch import device

    on_gpu = device.is_gpu()
    name = mx.device_info().get("device_name", "GPU") if on_gpu else f"CPU, {platform.machine()}"
    facts = {"device": str(name), "matmul": f"{_gflops():,.0f} GFLOPS (float32)"}
    if sys.platform == "linux" and not on_gpu:
        facts |= {"blas": blas.identity(), "because": blas.LOADED.why}
        facts["cores"] = (
            f"{device.num_cores()}, of which a process computes with {blas.num_threads() or 1}; "
            "--workers N starts N processes"
        )
    return facts


def _gflops() -> float:
    """Measure a product of two matrices, the best of some."""
    import mlx.core as mx

    matrix = mx.full((_MATMUL_SIZE, _MATMUL_SIZE), 0.5)
    mx.eval(matrix)
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < _MEASURE_S:
        start = time.perf_counter()
        mx.eval(matrix @ matrix)
        best = min(best, time.perf_counter() - start)
    return 2 * _MATMUL_SIZE**3 / best / 1e9


def _memory() -> dict[str, str]:
    import mlx.core as mx

    from dspark_batch import device

    facts = {"machine": _gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))}
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not on macOS
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        facts["free"] = f"{_gigabytes(free)}, and what caches give back"
    if device.is_gpu():
        info = mx.device_info()
        for fact, key in (
            ("device", "memory_size"),
            ("usable", "max_recommended_working_set_size"),
        ):
            if key in info:
                facts[fact] = _gigabytes(int(info[key]))
    return facts


def _folders(found: Diagnosis) -> dict[str, str]:
    from huggingface_hub import constants, get_token

    from dspark_batch.device import cache_folder

    folders = {
        "Hub cache": (Path(constants.HF_HUB_CACHE), "HF_HOME"),
        "own cache": (cache_folder(), "DSPARK_BATCH_CACHE"),
    }
    facts = {}
    for name, (folder, variable) in folders.items():
        facts[name] = f"{folder}, {_room(folder, variable, found)}"
    known = "what is known of their products and speed; --forget drops it"
    facts["machines"] = f"{cache_folder() / 'machines'}, {known}"
    facts["Hub"] = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "asked when needed"
    # Whether there is one, never the token itself.
    facts["Hub login"] = "yes" if get_token() else "no; gated repositories need `hf auth login`"
    return facts


def _room(folder: Path, variable: str, found: Diagnosis) -> str:
    """Say how much room a folder has, and whether it can be used at all."""
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        found.problems.append(f"{folder}: cannot be written. Name another folder in {variable}.")
        return "cannot be written"
    free = shutil.disk_usage(nearest).free
    if free < _MIN_FREE_BYTES:
        found.problems.append(
            f"{folder}: {_gigabytes(free)} left on its disk, expected 1 GB. Make room, or name "
            f"another folder in {variable}."
        )
    return f"{_gigabytes(free)} free"


def _pairs(found: Diagnosis) -> dict[str, str]:
    try:
        pairs = list_pairs()
    except DsparkBatchError as error:
        found.problems.append(str(error))
        return {}
    for pair in pairs:
        found.problems.extend(_damage(pair))
    return {pair.family: f"on disk: {pair.on_disk}" for pair in pairs}


def _damage(pair: RegisteredPair) -> Iterator[str]:
    for reason in pair.damage:
        if pair.bundled:
            yield f"{reason} It belongs to this package: install dspark-batch again."
        else:
            yield f"{reason} A run with --family {pair.family} downloads what is missing."


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
