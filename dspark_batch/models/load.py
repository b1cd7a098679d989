"""Loads a target and its drafter, and checks that they fit."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_config, load_model

from dspark_batch.errors import ModelError, UsageError
from dspark_batch.models.calibration import kept_temperatures
from dspark_batch.models.checkpoint import check_files, check_finite, digest, locate, read_config
from dspark_batch.models.dspark import DSparkDrafter
from dspark_batch.models.number_type import DTYPES, fastest_dtype
from dspark_batch.models.packaging import load_drafter
from dspark_batch.models.pairs import DEFAULT_FAMILY, known_pair
from dspark_batch.models.plain import NoDrafter
from dspark_batch.models.target import (
    PairConfig,
    Target,
    TargetFacts,
    ends_of,
    text_config,
)
from dspark_batch.models.tokenizer import Tokenizer, read_tokenizer

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.jinja")
_PROBE_TOKENS = 8


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
    facts = TargetFacts.of(model)
    loaded = load_drafter(drafter_dir, facts, ends_of(model)) if drafter_dir else NoDrafter()
    dtype = dtype or fastest_dtype(model)
    _settle(model, dtype, target_dir)
    if isinstance(loaded, DSparkDrafter):
        _settle(loaded, dtype, drafter_dir)

    tokenizer = _read_tokenizer(target_dir, config)
    identity = _identity(target_dir, drafter_dir, tokenizer, dtype)
    temperatures = kept_temperatures(identity)
    pair_config = PairConfig(
        family=family,
        dtype=dtype,
        context_length=facts.context_length,
        stop_ids=tokenizer.stop_ids if tokenizer else _stop_ids(config),
        identity=identity | {"calibration": temperatures and str(temperatures)},
        confidence_temperatures=temperatures,
    )
    tap_ids = loaded.config.target_layer_ids if isinstance(loaded, DSparkDrafter) else ()
    tapped = _tap(model, tap_ids, pair_config, target_dir)
    return Pair(tapped, tokenizer, loaded, pair_config)


def _load_target(directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    changes = _for_mlx_lm(read_config(directory))
    check_files(directory)  # a clear sentence, before mlx-lm's own
    try:
        model, _ = load_model(directory, lazy=True, model_config=changes)
        return model, load_config(directory)
    except (FileNotFoundError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{directory}: mlx-lm cannot load it as a target ({_short(error)}). "
            "Download it again, or name another --target."
        ) from error


def _for_mlx_lm(config: dict[str, Any]) -> dict[str, Any]:
    """Say what mlx-lm's loader must be told about a config that transformers wrote."""
    changes = {}
    if "vocab_size" not in config and "vocab_size" in text_config(config):
        changes["vocab_size"] = text_config(config)["vocab_size"]  # it reads only the outer one
    if config.get("model_type") == "gemma4_unified_text":
        changes["model_type"] = "gemma4_text"
    return changes


def _short(error: Exception) -> str:
    """Put mlx-lm's message, which lists tensors line by line, on one line."""
    return textwrap.shorten(" ".join(str(error).split()), 200) or type(error).__name__


def _settle(module: nn.Module, dtype: str, directory: Path) -> None:
    """Bring weights into memory in the type of the computation; they must be numbers."""
    module.set_dtype(DTYPES[dtype])
    mx.eval(module.parameters())
    check_finite(module, directory)


def _tap(model: nn.Module, tap_ids: tuple[int, ...], config: PairConfig, directory: Path) -> Target:
    """Tap a target, and check that it still computes what it computed."""
    tokens = mx.arange(_PROBE_TOKENS)[None] + 1
    plain = model(tokens, cache=make_prompt_cache(model))
    mx.eval(plain)
    target = Target(model, tap_ids, config)
    tapped, _ = target(tokens, make_prompt_cache(model))
    if not mx.array_equal(plain, tapped):
        raise ModelError(
            f"{directory}: its logits change when its layers {list(tap_ids)} are read, expected "
            "the same bits. This mlx-lm does not fit; install the version that we pin."
        )
    return target


def _read_tokenizer(directory: Path, config: dict[str, Any]) -> Tokenizer | None:
    if not any(directory.glob("tokenizer*")):
        return None
    return read_tokenizer(directory, config.get("eos_token_id"))


def _stop_ids(config: dict[str, Any]) -> frozenset[int]:
    ids = config.get("eos_token_id", text_config(config).get("eos_token_id"))
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
