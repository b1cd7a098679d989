"""Checkpoints in the formats of the real ones: an HF directory, weights in bf16."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.utils import load_model

from dspark_batch.drafters.drafter_config import DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.train.fit import compute_dtype


def save_model(model: nn.Module, config: Mapping[str, Any], directory: Path) -> None:
    """Write config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.astype(mx.bfloat16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "pt"})
    write_json(config, directory / "config.json")


def write_json(content: object, path: Path) -> None:
    """Write a file that people read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:  # noqa: ANN401  JSON
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def new_target(config: Mapping[str, Any]) -> qwen3.Model:
    """Make a Qwen3 target with fresh weights."""
    return qwen3.Model(qwen3.ModelArgs.from_dict(config))


def new_drafter(config: Mapping[str, Any]) -> DSparkDrafter:
    """Make a drafter with fresh weights."""
    return DSparkDrafter(DrafterConfig.from_dict(config))


def load_target(directory: Path) -> qwen3.Model:
    """Load a target, to compute in `compute_dtype`."""
    model = load_model(directory)[0]
    model.set_dtype(compute_dtype())
    return model


def load_drafter(directory: Path) -> DSparkDrafter:
    """Load a drafter, to compute in `compute_dtype`."""
    drafter = new_drafter(read_json(directory / "config.json"))
    drafter.load_weights(str(directory / "model.safetensors"))
    drafter.set_dtype(compute_dtype())
    return drafter
