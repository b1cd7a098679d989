"""Qwen3.5's checkpoints, in the three layouts in which they are published."""

import json
import shutil

import mlx.core as mx
import pytest
from checkpoints import read, write
from golden_cases import GOLDEN
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from dspark_batch.errors import ModelError
from dspark_batch.pair import load_pair, load_reading

TARGETS = ["qwen35_tiny", "qwen35_tiny4", "qwen35_moe_tiny"]
TOKENS = mx.array([[5, 6, 7, 8, 9, 10]])


def published(name):
    folder = GOLDEN / "targets" / name
    return read(folder / "config.json"), mx.load(str(folder / "model.safetensors"))


def text_only(name):
    """As transformers saves the text model alone."""
    config, weights = published(name)
    text = {**config["text_config"], "eos_token_id": 1}
    del text["full_attention_interval"]
    own = {n.replace("model.language_model.", "model."): w for n, w in weights.items()}
    return text, {n: w for n, w in own.items() if "visual" not in n and "mtp" not in n}


def converted(name):
    """As mlx-lm's converter writes it."""
    model, config = load_model(GOLDEN / "targets" / name)
    return config, dict(tree_flatten(model.parameters()))


def logits(directory):
    return load_pair(target=str(directory), dtype="float32").target.by_itself(TOKENS)[0]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("layout", [text_only, converted])
def test_every_layout_is_the_same_model(tmp_path, layout, name):
    other = write(tmp_path / "target", *layout(name))
    assert mx.array_equal(logits(other), logits(GOLDEN / "targets" / name))


def test_the_text_only_types_are_what_transformers_writes():
    assert text_only("qwen35_tiny")[0]["model_type"] == "qwen3_5_text"
    assert text_only("qwen35_moe_tiny")[0]["model_type"] == "qwen3_5_moe_text"


def test_another_interval_is_read_off_the_layers(tmp_path):
    config, weights = text_only("qwen35_tiny4")
    kinds = config["layer_types"][::-1]  # full attention first
    other = write(tmp_path / "target", config | {"layer_types": kinds}, weights)
    with pytest.raises(ModelError, match="expected full attention in every layer of an interval"):
        load_pair(target=str(other))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_output_gate", False),
        ("output_gate_type", "sigmoid"),
        ("mamba_ssm_dtype", "bfloat16"),
        ("hidden_act", "gelu"),
        ("full_attention_interval", 2),
    ],
)
def test_what_mlx_lm_would_not_read_is_refused_by_a_run_and_by_check(tmp_path, key, value):
    target = tmp_path / "target"
    shutil.copytree(GOLDEN / "targets" / "qwen35_tiny4", target)
    config = read(target / "config.json")
    config["text_config"][key] = value
    (target / "config.json").chmod(0o644)
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{key}.* is {value}|{key} is '{value}'"):
        load_pair(target=str(target))
    with pytest.raises(ModelError, match=f"{key}.* is {value}|{key} is '{value}'"):
        load_reading(target=str(target))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_decay_stays_in_float32(dtype):
    pair = load_pair(target=str(GOLDEN / "targets" / "qwen35_tiny"), dtype=dtype)
    found = {
        name.rpartition(".")[2]: array.dtype
        for name, array in tree_flatten(pair.target.model.parameters())
    }
    assert found["A_log"] == mx.float32
    assert found["dt_bias"] == found["weight"] == getattr(mx, dtype)
