"""Checkpoint directories: where they are, what is in them, what identifies them."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import orjson
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx.utils import tree_flatten

from dspark_batch.errors import ModelError

_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def locate(name: str) -> Path:
    """Return the directory of a checkpoint, downloading it from the Hub if it is an id.

    Raises:
        ModelError: neither a directory nor something the Hub or its cache can give.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"{name}: no such directory. Name a checkpoint directory or a Hub id.")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except HFValidationError as error:
        raise ModelError(f"{name}: neither a directory nor a Hub id ({error}).") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{name}: not in the local cache, and the Hub did not give it ({_first_line(error)}). "
            "Check the name, the network and your access, or name a local directory."
        ) from error


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


def read_weights(directory: Path) -> dict[str, mx.array]:
    """Read all tensors of model*.safetensors, lazily.

    Raises:
        ModelError: there are none, or a file is damaged.
    """
    paths = sorted(directory.glob("model*.safetensors"))
    if not paths:
        raise ModelError(f"{directory}: no model*.safetensors. Download the checkpoint again.")
    weights: dict[str, mx.array] = {}
    for path in paths:
        try:
            weights.update(mx.load(str(path)))
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{path}: not a whole safetensors file ({_first_line(error)}). "
                "Download the checkpoint again."
            ) from error
    return weights


def load_strictly(module: nn.Module, weights: Mapping[str, mx.array], directory: Path) -> None:
    """Put tensors into a module, each where it belongs, none left over.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape; the message names it.
    """
    expected = dict(tree_flatten(module.parameters()))
    for name, array in expected.items():
        if name not in weights:
            raise ModelError(f"{directory}: tensor {name} is missing. Download it again.")
        if weights[name].shape != array.shape:
            raise ModelError(
                f"{directory}: tensor {name} has shape {weights[name].shape}, config.json asks "
                f"for {array.shape}."
            )
    if unknown := sorted(set(weights) - set(expected)):
        raise ModelError(
            f"{directory}: unexpected tensor {unknown[0]}, one of {len(unknown)} that the "
            "architecture in config.json does not have."
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
