"""Checkpoint directories: what is in them, and what identifies them."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import orjson

from dspark_batch.errors import ModelError
from dspark_batch.numerics.arrays import named_arrays

_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ModelError: it is missing or not a JSON object.
    """
    path = directory / "config.json"
    try:
        config = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; {directory} is not a checkpoint directory.") from error
    except orjson.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON ({error}). Download the checkpoint again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return config


def check_files(directory: Path) -> list[Path]:
    """Check that the weights are there and whole, and list their files; reads only headers.

    Raises:
        ModelError: there are none, one that the index names is missing, or one is damaged.
    """
    paths = sorted(directory.glob("model*.safetensors"))
    for shard in _shards(directory / "model.safetensors.index.json"):
        if directory / shard not in paths:
            raise ModelError(
                f"{directory / shard}: missing, and model.safetensors.index.json names it. "
                "Download the checkpoint again."
            )
    if not paths:
        raise ModelError(f"{directory}: no model*.safetensors. Download the checkpoint again.")
    for path in paths:
        _check_length(path)
    return paths


def _shards(index: Path) -> list[str]:
    """List the files that an index names; none without an index."""
    if not index.exists():
        return []
    try:
        return sorted(set(orjson.loads(index.read_bytes())["weight_map"].values()))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index}: expected a weight_map of tensors to files ({first_line(error)}). "
            "Download the checkpoint again."
        ) from error


def _check_length(path: Path) -> None:
    """Compare a file's length with what its header announces; MLX would notice only later."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_len = int.from_bytes(file.read(8), "little")
            header = orjson.loads(file.read(header_len)) if header_len < size else {}
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + header_len + max(entry["data_offsets"][1] for entry in tensors)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{path}: {size} bytes that are no safetensors file. Download the checkpoint again."
        ) from error
    if size != whole:
        raise ModelError(
            f"{path}: {size} bytes, expected {whole}: it was not downloaded whole. "
            "Download the checkpoint again."
        )


def read_weights(directory: Path) -> dict[str, mx.array]:
    """Read all tensors of model*.safetensors, lazily.

    Raises:
        ModelError: there are none, or a file is missing, damaged, or of a type unknown to MLX.
    """
    weights: dict[str, mx.array] = {}
    for path in check_files(directory):
        try:
            tensors: Any = mx.load(str(path))
            weights.update(tensors)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{path}: MLX cannot read it ({first_line(error)}). Download the checkpoint again."
            ) from error
    return weights


def settle(module: nn.Module, finite: Mapping[str, mx.array], directory: Path) -> None:
    """Bring a module's weights into memory, tensor by tensor; they must be numbers.

    Args:
        module: its weights may still be lazy, and quantised lazily.
        finite: from `finiteness`, taken before that.
        directory: the checkpoint, for messages.

    Raises:
        ModelError: a tensor holds NaN or infinity; the message names it.
    """
    arrays = dict(named_arrays(module))
    for name, flag in finite.items():
        owner = name.rpartition(".")[0]
        parts = (f"{owner}.{part}" for part in ("weight", "scales", "biases"))
        # Together, so that a tensor that is only quantised is read once and let go.
        mx.eval(flag, [arrays[part] for part in parts if part in arrays])
        if not flag.item():
            raise ModelError(
                f"{directory}: tensor {name} holds NaN or infinity, expected numbers. "
                "Download the checkpoint again, or compute in another --dtype."
            )
    mx.eval(module.parameters())


def finiteness(module: nn.Module) -> dict[str, mx.array]:
    """Say, still lazily, of each tensor of a module whether it holds numbers only."""
    return {
        name: mx.isfinite(array).all()
        for name, array in named_arrays(module)
        if mx.issubdtype(array.dtype, mx.floating)
    }


def load_strictly(module: nn.Module, weights: Mapping[str, mx.array], directory: Path) -> None:
    """Put tensors into a module, each where it belongs, none left over.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape; the message names it.
    """
    expected = dict(named_arrays(module))
    for name, array in expected.items():
        if name not in weights:
            raise ModelError(
                f"{directory}: tensor {name} is missing, config.json asks for it. "
                "Download the checkpoint again."
            )
        if weights[name].shape != array.shape:
            raise ModelError(
                f"{directory}: tensor {name} has shape {weights[name].shape}, expected "
                f"{array.shape} by config.json. Download the checkpoint again."
            )
    if unknown := sorted(set(weights) - set(expected)):
        raise ModelError(
            f"{directory}: unexpected tensor {unknown[0]}, one of {len(unknown)} that config.json "
            "does not ask for. Name a checkpoint whose files belong together."
        )
    module.load_weights(list(weights.items()))


def digest(directory: Path, *patterns: str) -> str:
    """Hash the names and contents of a checkpoint's files, as sha256 in hex.

    A Hub cache names large files by the sha256 of their content; those are not read again.
    """
    whole = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in directory.glob(pattern)}):
        whole.update(f"{path.name}\0{_content_digest(path)}\0".encode())
    return whole.hexdigest()


def _content_digest(path: Path) -> str:
    real = path.resolve()
    if path.is_symlink() and _SHA256.fullmatch(real.name):
        return real.name
    with real.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """Shorten another library's message to what fits into a sentence."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
