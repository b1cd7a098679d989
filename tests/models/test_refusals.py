"""What cannot be used is refused in one sentence that says where, what, and what to do."""

import json
import re
import shutil

import checkpoints as make
import mlx.core as mx
import pytest

from dspark_batch.errors import ModelError
from dspark_batch.models import taps
from dspark_batch.pair import load_pair

QWEN = make.qwen3()
GOOD = make.deepspec(QWEN)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make.write_target(tmp_path_factory.mktemp("pair") / "target", QWEN)


@pytest.fixture(scope="module")
def weights():
    return make.drafter_weights(GOOD)


def refusal(target, drafter):
    """The refusal's text, which must be one line that ends with what to do."""
    with pytest.raises(ModelError) as caught:
        load_pair(target=str(target), drafter=drafter and str(drafter), dtype="float32")
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert text.endswith(".")
    return text


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


def nested(key, value):
    return make.zlab(QWEN) | {"dflash_config": make.zlab(QWEN)["dflash_config"] | {key: value}}


def inner(**changes):
    whole = make.speculators(QWEN)
    return whole | {"transformer_layer_config": whole["transformer_layer_config"] | changes}


CONFIGS = {
    # other packagings
    "DFlash 2 by its class": (
        make.zlab(QWEN, architectures=["DFlash2DraftModel"]),
        "this is a DFlash 2 drafter",
    ),
    "DFlash 2 by its keys": (nested("selector_rank", 64), "this is a DFlash 2 drafter"),
    "EAGLE-3": (GOOD | {"architectures": ["LlamaForCausalLMEagle3"]}, "EAGLE-3"),
    "EAGLE-3 by speculators": (
        make.speculators(QWEN, speculators_model_type="eagle3"),
        "EAGLE-3",
    ),
    "another kind of speculators": (
        make.speculators(QWEN, speculators_model_type="dflash"),
        "a speculators drafter of type dflash",
    ),
    "a whole model": (QWEN, r"a whole model \(Qwen3ForCausalLM\), expected"),
    "a drafter inside a whole model": (
        {"architectures": ["DeepseekV4ForCausalLM"], "dspark_block_size": 5},
        "a whole model .* with a drafter inside it",
    ),
    "an unknown class": (GOOD | {"architectures": ["LlamaDSparkModel"]}, "known are Qwen3DSpark"),
    "no class": (without("architectures"), "has no architectures"),
    "an empty list of classes": (GOOD | {"architectures": []}, r"architectures is \[\]"),
    # does not fit
    "another hidden size": (GOOD | {"hidden_size": 40}, "hidden_size 40, and the target has 32"),
    "another vocabulary": (GOOD | {"vocab_size": 65}, "vocab_size 65, and the target has 64"),
    "another depth": (GOOD | {"num_target_layers": 5}, "num_target_layers 5, and the target has 4"),
    "z-lab, another hidden size": (
        make.zlab(QWEN, hidden_size=40),
        "hidden_size 40, and the target has 32",
    ),
    "speculators, another vocabulary": (
        inner(vocab_size=65) | {"draft_vocab_size": 65},
        "vocab_size 65, and the target",
    ),
    # keys
    "no taps": (without("target_layer_ids"), "has no target_layer_ids"),
    "no mask": (without("mask_token_id"), "has no mask_token_id"),
    "no rank": (without("markov_rank"), "has no markov_rank"),
    "no kind of head": (without("markov_head_type"), "has no markov_head_type"),
    "no word on confidence": (without("enable_confidence_head"), "has no enable_confidence_head"),
    "no features of confidence": (
        without("confidence_head_with_markov"),
        "has no confidence_head_with_markov",
    ),
    "no theta": (GOOD | {"rope_parameters": {"rope_type": "default"}}, "has no rope_theta"),
    "no rope at all": (without("rope_parameters"), "has no rope_theta"),
    "an unknown head": (
        GOOD | {"markov_head_type": "lstm"},
        "markov_head_type is 'lstm', expected vanilla or gated or rnn",
    ),
    "confidence without Markov": (
        make.without_markov(GOOD, enable_confidence_head=True, confidence_head_with_markov=True),
        "confidence_head_with_markov is true, expected false",
    ),
    "falling taps": (GOOD | {"target_layer_ids": [2, 0]}, "expected rising layer numbers from -1"),
    "taps behind the target": (GOOD | {"target_layer_ids": [0, 4]}, "to 3"),
    "taps that are no numbers": (GOOD | {"target_layer_ids": "all"}, "target_layer_ids is all"),
    "a mask behind the vocabulary": (GOOD | {"mask_token_id": 64}, "mask_token_id is 64"),
    "half a block": (GOOD | {"block_size": 3.5}, "block_size is 3.5, expected a whole number"),
    "another activation": (GOOD | {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
    "a window in DeepSpec": (
        GOOD | {"layer_types": ["sliding_attention"] * 2},
        "layer_types is .* expected full_attention only",
    ),
    "an unknown rope": (
        GOOD | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "spiral"}},
        "Unsupported RoPE type spiral",
    ),
    "gemma without its own rope": (
        make.deepspec(make.gemma4()) | {"rope_parameters": {"rope_theta": 1e4}},
        "has no full_attention",
    ),
    "z-lab without its object": (make.zlab(QWEN, dflash_config=None), "has no dflash_config"),
    "z-lab with a Markov head": (nested("markov_rank", 8), "markov_rank is 8"),
    "z-lab with attention sinks": (nested("attention_sink_bias", True), "attention_sink_bias"),
    "z-lab with a scale of its own": (
        nested("input_embedding_scale", 5.5),
        "embedding_scale is 5.5",
    ),
    "z-lab with a window of no size": (
        make.zlab(QWEN, layer_types=["sliding_attention", "full_attention"]),
        "has no sliding_window",
    ),
    "speculators on another backbone": (inner(model_type="llama"), "model_type is 'llama'"),
    "speculators on a wider target": (
        make.speculators(QWEN, target_hidden_size=64),
        "target_hidden_size is 64",
    ),
    "speculators with the last layer": (
        make.speculators(QWEN, aux=(1, 4)),
        r"aux_hidden_state_layer_ids is \[1, 4\], expected .* to 3",
    ),
    "speculators without its table": (
        make.speculators(QWEN, draft_vocab_size=24),
        "the table d2t is missing",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_used_is_refused_by_name(tmp_path, target, weights, name):
    config, reason = CONFIGS[name]
    drafter = make.write(tmp_path / "drafter", config, weights)
    text = refusal(target, drafter)
    assert text.startswith(str(drafter / "config.json"))
    assert re.search(reason, text), text


def test_a_table_that_leaves_the_vocabulary_is_refused(tmp_path, target):
    config = make.speculators(QWEN, draft_vocab_size=24)
    tensors = make.drafter_weights(config) | {"d2t": mx.full(24, 60)}
    drafter = make.write(tmp_path / "drafter", config, tensors)
    assert "d2t does not name rising token ids" in refusal(target, drafter)


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path, target, weights):
    config = GOOD | {"tie_word_embeddings": True}
    drafter = make.write(tmp_path / "drafter", config, weights)
    assert "lm_head.weight is not the embedding" in refusal(target, drafter)


def test_a_tied_head_that_is_the_embedding_may_be_stored(tmp_path, target, weights):
    config = GOOD | {"tie_word_embeddings": True}
    tensors = weights | {"lm_head.weight": weights["embed_tokens.weight"]}
    drafter = make.write(tmp_path / "drafter", config, tensors)
    assert (
        load_pair(target=str(target), drafter=str(drafter), dtype="float32").drafter.block_size == 7
    )


TENSORS = {
    "missing": (
        lambda w: {n: a for n, a in w.items() if n != "fc.weight"},
        "tensor fc.weight is missing",
    ),
    "extra": (lambda w: w | {"fc.bias": mx.zeros(32)}, "unexpected tensor fc.bias"),
    "of another shape": (
        lambda w: w | {"norm.weight": mx.ones(33)},
        r"tensor norm.weight has shape \(33,\), expected \(32,\)",
    ),
    "not a number": (
        lambda w: w | {"norm.weight": mx.array([mx.nan] * 32)},
        "tensor norm.weight holds NaN or infinity",
    ),
    "infinite": (
        lambda w: w | {"layers.1.self_attn.q_norm.weight": mx.array([mx.inf] * 16)},
        "tensor layers.1.self_attn.q_norm.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_drafters_tensor_that_is_wrong_is_named(tmp_path, target, weights, name):
    change, reason = TENSORS[name]
    drafter = make.write(tmp_path / "drafter", GOOD, change(weights))
    with pytest.raises(ModelError, match=reason):
        load_pair(target=str(target), drafter=str(drafter), dtype="float32")
    assert str(drafter) in refusal(target, drafter)


TARGET_TENSORS = {
    "missing": (
        lambda w: {n: a for n, a in w.items() if n != "model.norm.weight"},
        "model.norm.weight",
    ),
    "extra": (lambda w: w | {"model.norm.bias": mx.zeros(32)}, "model.norm.bias"),
    "of another shape": (lambda w: w | {"model.norm.weight": mx.ones(33)}, "model.norm.weight"),
    "not a number": (
        lambda w: w | {"model.norm.weight": mx.array([mx.nan] * 32)},
        "model.norm.weight holds NaN",
    ),
}


@pytest.mark.parametrize("name", TARGET_TENSORS)
def test_a_targets_tensor_that_is_wrong_is_named(tmp_path, name):
    change, reason = TARGET_TENSORS[name]
    target = make.write(tmp_path / "target", QWEN, change(make.target_weights(QWEN)))
    text = refusal(target, None)
    assert str(target) in text
    assert reason in text


@pytest.mark.parametrize(
    ("config", "key", "reason"),
    [
        (QWEN, "model_type", "config.json has no 'model_type'"),
        (QWEN, "hidden_size", "config.json has no 'hidden_size'"),
        (QWEN, "rope_parameters", "rope_theta is missing from the model config"),
        (make.gemma4(), "hidden_size", "Expected shape .* for parameter model.embed_tokens.weight"),
        (make.gemma4(), "num_hidden_layers", "list index out of range"),
    ],
)
def test_a_targets_config_without_a_key_is_refused(tmp_path, config, key, reason):
    weights = make.target_weights(config)
    target = make.write(tmp_path / "t", {k: v for k, v in config.items() if k != key}, weights)
    assert re.search(reason, refusal(target, None))


@pytest.mark.parametrize("part", ["target", "drafter"])
@pytest.mark.parametrize("damage", ["a shard is missing", "cut short", "empty", "not safetensors"])
def test_half_a_download_is_refused_by_file(tmp_path, target, part, damage):
    folders = {"target": target, "drafter": tmp_path / "whole"}
    make.write_drafter(folders["drafter"], GOOD)
    config = QWEN if part == "target" else GOOD
    tensors = make.target_weights(config) if part == "target" else make.drafter_weights(config)
    broken = make.write(tmp_path / "broken", config, tensors, shards=2)
    file = broken / "model-00002-of-00002.safetensors"
    if damage == "a shard is missing":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.write_bytes(b"" if damage == "empty" else b"not a checkpoint at all" * 9)
    folders[part] = broken
    text = refusal(folders["target"], folders["drafter"])
    assert text.startswith(str(file))
    assert "Download the checkpoint again." in text


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_no_object_is_refused(tmp_path, target, weights, content):
    drafter = make.write(tmp_path / "drafter", GOOD, weights)
    (drafter / "config.json").write_text(content)
    assert str(drafter / "config.json") in refusal(target, drafter)


def test_an_index_that_is_none_is_refused(tmp_path, target, weights):
    drafter = make.write(tmp_path / "drafter", GOOD, weights)
    (drafter / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    assert "expected a weight_map" in refusal(target, drafter)


def test_a_directory_without_weights_or_config_is_refused(tmp_path, target, weights):
    drafter = make.write(tmp_path / "drafter", GOOD, weights)
    (drafter / "model.safetensors").unlink()
    assert "no model*.safetensors" in refusal(target, drafter)
    (drafter / "config.json").unlink()
    assert "config.json: missing" in refusal(target, drafter)
    shutil.rmtree(drafter)
    assert "no such directory" in refusal(target, drafter)


def test_a_tap_that_changes_the_targets_logits_is_refused(tmp_path, target, weights, monkeypatch):
    record = taps._record_output

    def spoil(layer, *rest):
        record(layer, *rest)
        layer.input_layernorm.weight = layer.input_layernorm.weight * 2

    monkeypatch.setattr(taps, "_record_output", spoil)
    drafter = make.write(tmp_path / "drafter", GOOD, weights)
    assert "its logits change when its layers [0, 2] are read" in refusal(target, drafter)


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from mlx_lm.models.qwen3 import Model, ModelArgs
"""


@pytest.mark.parametrize(
    "asks", [{"model_file": "own.py"}, {"auto_map": {"AutoModelForCausalLM": "own.Model"}}]
)
def test_code_of_a_target_runs_only_if_it_is_trusted(tmp_path, asks):
    target = make.write_target(tmp_path / "target", QWEN)
    (target / "config.json").write_text(json.dumps(QWEN | asks))
    (target / "own.py").write_text(CODE)
    text = refusal(target, None)
    assert text.startswith(f"{target / 'config.json'}: {next(iter(asks))} asks to run Python code")
    assert "add --trust-remote-code" in text
    assert not (target / "ran").exists()
    load_pair(target=str(target), dtype="float32", trust_remote_code=True)
    assert (target / "ran").exists() == ("model_file" in asks)  # mlx-lm knows only this key


def test_code_of_a_drafter_never_runs(tmp_path, target, weights):
    config = GOOD | {"auto_map": {"AutoModel": "own.Model"}, "model_file": "own.py"}
    drafter = make.write(tmp_path / "drafter", config, weights)
    (drafter / "own.py").write_text(CODE)
    load_pair(target=str(target), drafter=str(drafter), dtype="float32", trust_remote_code=True)
    assert not (drafter / "ran").exists()
