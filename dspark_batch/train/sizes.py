"""How large a drafter is that nobody gave sizes for: a rule, from the target's own sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_batch import device
from dspark_batch.errors import UsageError
from dspark_batch.models.target import TargetFacts
from dspark_batch.train.training import Asked

_LAYERS_PER_DRAFT_LAYER = 7  # DeepSpec: 36 layers and 40 have a drafter of 5
_MOST_LAYERS, _MOST_TAPS, _MOST_RANK = 5, 5, 256
_BLOCK = 7
_GPU_TOKENS, _CPU_TOKENS = 16_384, 2_048
_MOST_LOGITS = 400 << 20  # of one step's slots; a step holds several arrays of them
_SLOTS_PER_TOKEN = 0.5
_RATE, _RATE_HIDDEN = 6e-4, 2560  # DeepSpec's, for Qwen3-4B


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a new drafter looks like."""

    kind: str  # "dspark" or "dflash"
    layers: int
    block: int  # tokens that one pass drafts
    taps: tuple[int, ...]  # layers of the target whose outputs it reads
    rank: int  # of the Markov head; 0: there is none


def sizes_for(facts: TargetFacts, asked: Asked) -> Sizes:
    """Choose what was not asked for.

    Raises:
        UsageError: the taps are no layers of this target, or a DFlash drafter was given a rank.
    """
    kind = asked.kind or "dspark"
    if kind == "dflash" and asked.rank:
        raise UsageError(
            f"--rank is {asked.rank}, but a DFlash drafter has no Markov head. Leave --rank out, "
            "or train with --kind dspark."
        )
    by_rule = min(_MOST_RANK, 64 * -(-facts.hidden_size // 512))
    rank = by_rule if asked.rank is None else asked.rank
    layers = max(1, min(_MOST_LAYERS, round(facts.num_layers / _LAYERS_PER_DRAFT_LAYER)))
    return Sizes(
        kind=kind,
        layers=asked.layers or layers,
        block=asked.block or _BLOCK,
        taps=_spread(facts.num_layers)
        if asked.taps is None
        else _checked(asked.taps, facts.num_layers),
        rank=0 if kind == "dflash" else rank,
    )


def _spread(num_layers: int) -> tuple[int, ...]:
    """Spread taps evenly from layer 1 to the third from the end, as DeepSpec's are."""
    last = max(0, num_layers - 3)
    first = min(1, last)
    count = min(_MOST_TAPS, last - first + 1)
    steps = max(1, count - 1)
    return tuple(first + round((last - first) * i / steps) for i in range(count))


def _checked(taps: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    if list(taps) != sorted(set(taps)) or taps[0] < -1 or taps[-1] >= num_layers:
        raise UsageError(
            f"--taps is {','.join(map(str, taps))}, expected rising layer numbers from -1 (the "
            f"embedding) to {num_layers - 1}."
        )
    return taps


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
        "architectures": ["Qwen3DSparkModel"],
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


def tokens_per_step(vocab_size: int) -> int:
    """Choose how many tokens a step reads: fewer with a large vocabulary, for the memory."""
    tokens = _CPU_TOKENS if device.is_cpu() else _GPU_TOKENS
    while tokens > _CPU_TOKENS and tokens * _SLOTS_PER_TOKEN * vocab_size > _MOST_LOGITS:
        tokens //= 2
    return tokens


def anchors_of(width: int, block: int) -> int:
    """Choose how many blocks a row has: their slots are half as many as the row's positions."""
    return max(1, min(512, round(width * _SLOTS_PER_TOKEN / block)))


def peak_rate(hidden_size: int) -> float:
    """Choose the learning rate: DeepSpec's, and more for a narrow model."""
    return _RATE * min(3.0, max(1.0, (_RATE_HIDDEN / hidden_size) ** 0.5))
