"""Describes a drafter that is to be made, in DeepSpec's packaging."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_batch.drafters.qwen3 import FAMILY
from dspark_batch.models.target import TargetFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a new drafter looks like."""

    kind: str  # "dspark" or "dflash"
    layers: int
    block: int  # tokens that one pass drafts
    taps: tuple[int, ...]  # layers of the target whose outputs it reads
    rank: int  # of the Markov head; 0: there is none


def new_config(
    sizes: Sizes, facts: TargetFacts, text: Mapping[str, Any], mask_token: int
) -> dict[str, Any]:
    """Describe a new drafter in DeepSpec's packaging.

    Args:
        sizes: of it.
        facts: of the target, whose width and vocabulary it shares.
        text: the target's own description, for what a draft layer copies of it.
        mask_token: the id that a block's slots behind the anchor are filled with.
    """
    heads, kv_heads, head_dim = _heads(facts.hidden_size, text)
    wide = text.get("intermediate_size") or 3 * facts.hidden_size
    config = {
        "architectures": [FAMILY.architecture],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": facts.vocab_size,
        "hidden_size": facts.hidden_size,
        "intermediate_size": min(wide, 4 * facts.hidden_size),
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": text.get("rms_norm_eps") or 1e-6,
        "rope_parameters": {"rope_theta": _theta(text), "rope_type": "default"},
        "max_position_embeddings": facts.context_length,
        "attention_bias": False,
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * sizes.layers,
        "tie_word_embeddings": False,
        "block_size": sizes.block,
        "num_target_layers": facts.num_layers,
        "target_layer_ids": list(sizes.taps),
        "mask_token_id": mask_token,
        "num_anchors": 512,
        "markov_rank": sizes.rank,
        "enable_confidence_head": sizes.kind == "dspark",
    }
    if sizes.rank:
        config["markov_head_type"] = "vanilla"
    if sizes.kind == "dspark":
        config["confidence_head_with_markov"] = bool(sizes.rank)
    return config


def _heads(hidden_size: int, text: Mapping[str, Any]) -> tuple[int, int, int]:
    """Copy the target's heads; else heads of 64."""
    heads = text.get("num_attention_heads")
    if heads:
        head_dim = text.get("head_dim") or hidden_size // heads
        kv_heads = text.get("num_key_value_heads") or heads
        if head_dim % 2 == 0 and heads % kv_heads == 0:
            return heads, kv_heads, head_dim
    heads = max(1, hidden_size // 64)
    return heads, heads, 64


def _theta(text: Mapping[str, Any]) -> float:
    """Look up how fast positions rotate, wherever the target's config says it."""
    nested = text.get("rope_parameters") or {}
    nested = nested.get("full_attention", nested)
    return float(nested.get("rope_theta") or text.get("rope_theta") or 10_000.0)
