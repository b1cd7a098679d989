"""The Qwen3 family, as DeepSpec's Qwen3DSparkModel has it."""

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.drafters.draft_layer import (
    BlockAttention,
    Family,
    FamilySettings,
    GatedMlp,
    KeyValues,
    LayerConfig,
)
from dspark_batch.models.config_reader import ConfigReader
from dspark_batch.numerics.exponential import swiglu


class DraftLayer(nn.Module):
    """One layer of the drafter, with Llama's two norms."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config, scale=config.head_dim**-0.5)
        self.mlp = GatedMlp(config, swiglu)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def keys_values(self, hidden: mx.array, offset: mx.array) -> tuple[mx.array, mx.array]:
        """Compute keys and values of fused context; see `BlockAttention.keys_values`."""
        return self.self_attn.keys_values(hidden, offset)

    def remember(self, hidden: mx.array, cache: KeyValues, offset: mx.array) -> None:
        """Write keys and values of fused context."""
        cache.update_and_fetch(*self.keys_values(hidden, offset))

    def __call__(
        self, block: mx.array, cache: KeyValues, offset: mx.array, mask: mx.array
    ) -> mx.array:
        """Run blocks [B, A*K, E] that start at offset [B*A]; mask broadcasts to the scores."""
        block = block + self.self_attn(self.input_layernorm(block), cache, offset, mask)
        return block + self.mlp(self.post_attention_layernorm(block))


def read_layer(read: ConfigReader) -> LayerConfig:
    """Read the layer's keys; transformers 5 nests the positions under rope_parameters."""
    read.one_of("hidden_act", "silu", default="silu")
    nested = read.get("rope_parameters")
    if nested is not None:
        nested = nested.get("full_attention", nested)
        if nested.get("rope_theta") is None:
            read.refuse("rope_parameters has no rope_theta, expected a number.")
    return LayerConfig(
        hidden_size=read.count("hidden_size"),
        intermediate_size=read.count("intermediate_size"),
        num_heads=read.count("num_attention_heads"),
        num_kv_heads=read.count("num_key_value_heads"),
        head_dim=read.count("head_dim"),
        rms_norm_eps=read.required("rms_norm_eps"),
        rope_theta=nested["rope_theta"] if nested else read.required("rope_theta"),
        rope_scaling=nested if nested else read.get("rope_scaling"),
        max_position_embeddings=read.count("max_position_embeddings"),
        attention_bias=read.get("attention_bias", False),
    )


def _read(read: ConfigReader) -> FamilySettings:
    return FamilySettings(read_layer(read))


FAMILY = Family("Qwen3DSparkModel", DraftLayer, _read)
