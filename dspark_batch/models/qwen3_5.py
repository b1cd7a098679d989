"""Qwen3.5: what mlx-lm's code must be told about a config, and what it would compute wrongly."""

from collections.abc import Mapping, Sequence
from typing import Any

_TEXT_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
# What configs say and mlx-lm does not read: it computes these values, and no others.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),
    "mamba_ssm_dtype": ("float32",),
    "hidden_act": ("silu",),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
}
_INTERVAL = "full_attention_interval"


def for_mlx_lm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what mlx-lm's loader must be told about a config of this family; {} for others.

    Raises:
        ValueError: mlx-lm would compute something else than the config says.
    """
    kind = config.get("model_type")
    if kind not in {*_TEXT_TYPES, *_TEXT_TYPES.values()}:
        return {}
    text = config.get("text_config") or config
    for key, values in _ONLY.items():
        if text.get(key) is not None and text[key] not in values:
            raise ValueError(f"{key} is {text[key]!r}, expected {values[0]!r}")
    changes: dict[str, Any] = {"model_type": _TEXT_TYPES.get(kind, kind)}
    if types := text.get("layer_types"):
        interval = _interval(types, text.get(_INTERVAL))
        if text is config:
            changes[_INTERVAL] = interval
        else:
            changes["text_config"] = {**text, _INTERVAL: interval}
    return changes


def _interval(types: Sequence[str], said: int | None) -> int:
    """Find how many layers there are for each one of full attention, of which the last is one."""
    found = types.index("full_attention") + 1 if "full_attention" in types else 0
    regular = [
        "linear_attention" if found and (number + 1) % found else "full_attention"
        for number in range(len(types))
    ]
    if not found or list(types) != regular or said not in (None, found):
        raise ValueError(
            f"layer_types is {list(types)} and {_INTERVAL} is {said}, "
            "expected full attention in every layer of an interval"
        )
    return found
