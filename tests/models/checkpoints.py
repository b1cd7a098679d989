"""Writes tiny random checkpoints with the configs of the real ones; only the sizes are smaller."""

import json
import os
from importlib import import_module
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING

from dspark_batch.drafters.dflash import read_dflash
from dspark_batch.drafters.drafter_config import ConfigReader, DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.drafters.speculators import read_speculators
from dspark_batch.models.target import TargetFacts

GOLDEN = Path(__file__).parents[1] / "golden"
VOCAB, HIDDEN = 64, 32
COMMIT = "0123456789abcdef" * 2 + "01234567"
# name -> target layers, tapped layers, mask token: what the released checkpoints have
REAL = {
    "qwen3_4b": (36, [1, 9, 17, 25, 33]),
    "qwen3_8b": (36, [1, 9, 17, 25, 33]),
    "qwen3_14b": (40, [1, 10, 19, 28, 37]),
    "gemma4_12b": (48, [5, 17, 29, 41, 46]),
}


def qwen3(layers=4, **changes):
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": 512,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
    } | changes


def gemma4(layers=6, **changes):
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    kinds[2] = "full_attention"  # both kinds, also in the smallest
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "attention_bias": False,
        "attention_k_eq_v": True,
        "enable_moe_block": False,
        "eos_token_id": [1, 7],
        "final_logit_softcapping": 8.0,
        "global_head_dim": 16,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 48,
        "layer_types": kinds,
        "max_position_embeddings": 512,
        "model_type": "gemma4_text",
        "num_attention_heads": 4,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "use_double_wide_mlp": False,
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
    } | changes


def wrapped(text, model_type="gemma4_unified"):
    """The multimodal config around a text config, as released: the text part is nested."""
    outer = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": model_type}
    return outer | {"text_config": text, "eos_token_id": text["eos_token_id"]}


def deepspec(target, taps=(0, 2), layers=2, **changes):
    """The drafter config that DeepSpec writes: the target's, changed and extended."""
    config = dict(target) | {
        "architectures": [
            "Gemma4DSparkModel" if "global_head_dim" in target else "Qwen3DSparkModel"
        ],
        "block_size": 7,
        "confidence_head_with_markov": True,
        "enable_confidence_head": True,
        "layer_types": ["full_attention"] * layers,
        "markov_head_type": "vanilla",
        "markov_rank": 8,
        "mask_token_id": VOCAB - 1,
        "num_anchors": 512,
        "num_hidden_layers": layers,
        "num_target_layers": target["num_hidden_layers"],
        "target_layer_ids": list(taps),
        "tie_word_embeddings": False,
    }
    if "global_head_dim" in target:  # left-overs of copying a nested config
        stray = {"rope_theta": None, "rope_type": "default"}
        config["rope_parameters"] = target["rope_parameters"] | stray
    return {key: value for key, value in (config | changes).items() if value is not ...}


def without_markov(config, **changes):
    """The DFlash twin: no Markov head and no confidence head, and their second keys absent."""
    absent = ("markov_head_type", "confidence_head_with_markov")
    twin = {key: value for key, value in config.items() if key not in absent}
    return twin | {"markov_rank": 0, "enable_confidence_head": False} | changes


def zlab(target, taps=(0, 2), layers=2, **changes):
    """An adapter as z-lab publishes it: Qwen3 layers for any target."""
    config = qwen3(layers, architectures=["DFlashDraftModel"], vocab_size=target["vocab_size"])
    nested = {"mask_token_id": VOCAB - 1, "target_layer_ids": list(taps)}
    extra = {"block_size": 6, "dflash_config": nested, "tie_word_embeddings": False}
    return config | extra | {"num_target_layers": target["num_hidden_layers"]} | changes


def speculators(target, aux=(1, 3), layers=2, **changes):
    """A drafter as vLLM's speculators library writes it; aux id i is the input of layer i."""
    return {
        "architectures": ["DSparkSpeculator"],
        "aux_hidden_state_layer_ids": list(aux),
        "block_size": 6,
        "confidence_head_with_markov": True,
        "draft_vocab_size": target["vocab_size"],
        "enable_confidence_head": True,
        "markov_head_type": "vanilla",
        "markov_rank": 8,
        "mask_token_id": VOCAB - 1,
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
        "speculators_config": {"algorithm": "dspark", "default_proposal_method": "greedy"},
        "speculators_model_type": "dspark",
        "speculators_version": "0.7.0",
        "target_hidden_size": None,
        "transformer_layer_config": qwen3(layers, architectures=None),
    } | changes


def as_transformers_4(config):
    """The same config as transformers 4 writes it: theta outside, other name of the dtype."""
    older = dict(config) | {"torch_dtype": "bfloat16", "transformers_version": "4.57.0"}
    if "full_attention" not in config.get("rope_parameters", {}):
        older |= {"rope_theta": older.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    return older


def random_weights(shapes, seed, scale=0.3):
    """Tensors for {name: shape}: norms near 1, all else near 0, large enough to matter."""
    weights = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        noise = mx.random.normal(shape, key=mx.random.key(1000 * seed + number))
        is_norm = any(word in name for word in ("norm", "scalar", "ln_"))
        near_one = is_norm and not name.endswith("bias")
        weights[name] = 1 + 0.2 * noise if near_one else scale * noise
    return weights


def model_of(text):
    """The model that mlx-lm makes of a text config; its weights are lazy."""
    kind = text["model_type"].removesuffix("_unified_text")
    family = import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
    return family.Model(family.ModelArgs.from_dict(text))


def target_weights(config, seed=1):
    """Random tensors under the names that transformers writes."""
    model = model_of(config.get("text_config", config))
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    weights = random_weights(shapes, seed)
    if "text_config" not in config:
        return weights
    inner = {name.replace("model.", "model.language_model.", 1): w for name, w in weights.items()}
    return inner | {"model.vision_tower.patch.weight": mx.ones((2, 2))}


def drafter_weights(config, seed=2):
    """Random tensors under the checkpoint's names."""
    parsed = parse(config)
    shapes = {name: w.shape for name, w in tree_flatten(DSparkDrafter(parsed).parameters())}
    weights = random_weights({n: s for n, s in shapes.items() if n != "d2t"}, seed)
    if "d2t" in shapes:
        drafted = mx.arange(0, 2 * shapes["d2t"][0], 2)  # every second token of the target
        weights["d2t"] = (drafted - mx.arange(shapes["d2t"][0])).astype(mx.int64)
        weights["t2d"] = (mx.arange(VOCAB)[:, None] == drafted).any(axis=1)
    return weights


def parse(config):
    """Read a config of any packaging, for a target that fits."""
    read = ConfigReader(config, "config.json")
    facts = TargetFacts(HIDDEN, VOCAB, config.get("num_target_layers", 48), 512, 1.0, None)
    if "speculators_model_type" in config:
        return read_speculators(read, {"d2t": mx.arange(config["draft_vocab_size"])}, facts)[0]
    if "dflash_config" in config:
        return read_dflash(read, facts)
    return DrafterConfig.from_dict(config)


def read(path):
    return json.loads(path.read_text())


def write(directory, config, weights, *, shards=1, dtype=mx.float32):
    """Write a checkpoint directory; floats in `dtype`, other tensors as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    names = sorted(weights)
    weights = {
        name: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in weights.items()
    }
    if shards == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "pt"})
        return directory
    index = {"metadata": {}, "weight_map": {}}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        mx.save_safetensors(str(directory / file), {n: weights[n] for n in part}, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_target(directory, config, **settings):
    return write(directory, config, target_weights(config), **settings)


def write_drafter(directory, config, **settings):
    return write(directory, config, drafter_weights(config), **settings)


def hub_cache(root, name, source, commit=COMMIT):
    """Put a checkpoint where the Hub's client keeps it: a snapshot of links to blobs."""
    repo = root / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for file in source.iterdir():
        (repo / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(repo / "blobs" / file.name, snapshot))
