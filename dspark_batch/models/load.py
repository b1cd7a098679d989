"""Loads a target and its drafter, and checks that they fit."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_config, load_model

from dspark_batch.errors import ModelError, UsageError
from dspark_batch.models.checkpoint import (
    digest,
    load_strictly,
    locate,
    read_config,
    read_weights,
)
from dspark_batch.models.drafter_config import DrafterConfig
from dspark_batch.models.dspark import DSparkDrafter
from dspark_batch.models.pairs import DEFAULT_FAMILY, known_pair
from dspark_batch.models.plain import NoDrafter
from dspark_batch.models.target import Target
from dspark_batch.models.tokenizer import Tokenizer, read_tokenizer

_DRAFTERS = {"Qwen3DSparkModel": DSparkDrafter}
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.jinja")
_PROBE_ROWS = 8  # a verify pass of one slot with block 7


@dataclass(frozen=True, slots=True)
class PairConfig:
    """What the rest of the program needs to know of a loaded pair."""

    family: str | None  # None: target and drafter were named one by one
    dtype: str  # of the computation
    context_length: int  # most positions of prompt and answer together
    stop_ids: frozenset[int]
    identity: dict[str, str | None]  # digests; all but "drafter" can change a greedy row


class Pair(NamedTuple):
    """A resident target and its drafter."""

    target: Target
    tokenizer: Tokenizer | None  # None: the target's directory has none
    drafter: DSparkDrafter | NoDrafter
    config: PairConfig


def load_pair(
    family: str | None = None,
    *,
    target: str | None = None,
    drafter: str | None = None,
    dtype: str | None = None,
) -> Pair:
    """Load a target and its drafter.

    Args:
        family: a name in the registry; the default is the bundled pair, unless `target` is given.
        target: directory or Hub id, instead of the family's.
        drafter: directory or Hub id, instead of the family's; a target of your own without a
            drafter decodes plainly.
        dtype: "float32", "bfloat16" or "float16"; None takes what computes fastest here.

    Raises:
        ModelError: something is missing, damaged, unsupported, or does not fit.
        UsageError: the family is unknown.
    """
    if family is None and target is None:
        if drafter is not None:
            raise UsageError("--drafter needs the --target or the --family that it drafts for.")
        family = DEFAULT_FAMILY
    known = known_pair(family) if family is not None else None
    target_dir = locate(target or known.target)
    drafter_name = drafter or (known.drafter if known and target is None else None)
    drafter_dir = locate(drafter_name) if drafter_name else None

    model, config = _load_target(target_dir)
    loaded = _load_drafter(drafter_dir, config) if drafter_dir else NoDrafter()
    dtype = dtype or _fastest_dtype(model)
    model.set_dtype(_DTYPES[dtype])
    if isinstance(loaded, nn.Module):
        loaded.set_dtype(_DTYPES[dtype])
        mx.eval(loaded.parameters())
    mx.eval(model.parameters())

    tokenizer = _read_tokenizer(target_dir, config)
    tap_ids = loaded.config.target_layer_ids if isinstance(loaded, DSparkDrafter) else ()
    pair_config = PairConfig(
        family=family,
        dtype=dtype,
        context_length=config["max_position_embeddings"],
        stop_ids=tokenizer.stop_ids if tokenizer else _stop_ids(config),
        identity=_identity(target_dir, drafter_dir, tokenizer, dtype),
    )
    return Pair(Target(model, tap_ids), tokenizer, loaded, pair_config)


def _load_target(directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    read_config(directory)  # a clear sentence, before mlx-lm's own
    try:
        model, _ = load_model(directory, lazy=True)
        return model, load_config(directory)
    except (FileNotFoundError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{directory}: mlx-lm cannot load it as a target ({error}). "
            "Download it again, or name another --target."
        ) from error


def _load_drafter(directory: Path, target: dict[str, Any]) -> DSparkDrafter:
    config = read_config(directory)
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in _DRAFTERS:
        raise ModelError(
            f"{directory}: its architecture is {architecture}, and drafters are known for "
            f"{', '.join(_DRAFTERS)}. Name another --drafter, or use --draft-length 0."
        )
    parsed = DrafterConfig.from_dict(config, str(directory / "config.json"))
    _check_fit(parsed, target, directory)
    drafter = _DRAFTERS[architecture](parsed)
    load_strictly(drafter, read_weights(directory), directory)
    return drafter


def _check_fit(drafter: DrafterConfig, target: dict[str, Any], directory: Path) -> None:
    pairs = {
        "hidden_size": (drafter.hidden_size, target["hidden_size"]),
        "vocab_size": (drafter.vocab_size, target["vocab_size"]),
        "num_target_layers": (drafter.num_target_layers, target["num_hidden_layers"]),
    }
    for key, (mine, its) in pairs.items():
        if mine != its:
            raise ModelError(
                f"{directory}: this drafter is for a target with {key} {mine}, and the target has "
                f"{its}. Name the drafter that was trained for this target."
            )


def _fastest_dtype(model: nn.Module) -> str:
    """Choose float32 or bfloat16 on a CPU by timing a matrix product; else keep the stored type.

    Quantised weights keep their type too: their scales were rounded for it.
    """
    linear = next(m for m in model.modules() if hasattr(m, "weight") and m.weight.ndim == 2)
    stored = str(linear.weight.dtype).removeprefix("mlx.core.")
    if mx.default_device() != mx.Device(mx.cpu) or stored not in _DTYPES:
        return stored if stored in _DTYPES else "bfloat16"
    return min(("float32", "bfloat16"), key=lambda name: _product_s(model, _DTYPES[name]))


def _product_s(model: nn.Module, dtype: mx.Dtype) -> float:
    """Time the first layer's MLP-sized product at the width of a verify pass, in seconds."""
    weight = model.layers[0].mlp.up_proj.weight.astype(dtype)
    rows = mx.ones((_PROBE_ROWS, weight.shape[1]), dtype=dtype)
    mx.eval(weight, rows @ weight.T)  # warm
    times = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(rows @ weight.T)
        times.append(time.perf_counter() - start)
    return min(times)


def _read_tokenizer(directory: Path, config: dict[str, Any]) -> Tokenizer | None:
    if not any(directory.glob("tokenizer*")):
        return None
    return read_tokenizer(directory, config.get("eos_token_id"))


def _stop_ids(config: dict[str, Any]) -> frozenset[int]:
    ids = config.get("eos_token_id")
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def _identity(
    target: Path, drafter: Path | None, tokenizer: Tokenizer | None, dtype: str
) -> dict[str, str | None]:
    return {
        "target": digest(target, "model*.safetensors", "config.json", "generation_config.json"),
        "tokenizer": digest(target, *_TOKENIZER_FILES),
        "chat_template": tokenizer.chat_template if tokenizer else None,
        "dtype": dtype,
        "drafter": digest(drafter, "model*.safetensors", "config.json") if drafter else None,
    }
