"""The Gemma 4 family, as DeepSpec's Gemma4DSparkModel has it."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gemma4_text import geglu

from dspark_batch.drafters.draft_layer import (
    BlockAttention,
    Family,
    FamilySettings,
    GatedMlp,
    KeyValues,
    LayerConfig,
)
from dspark_batch.models.config_reader import ConfigReader


class DraftLayer(nn.Module):
    """One layer of the drafter: norms on both sides of attention and MLP, and a scalar."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = _Attention(config, scale=1.0)
        self.mlp = GatedMlp(config, geglu)
        self.input_layernorm = nn.RMSNorm(size, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(size, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(size, eps=eps)
        self.layer_scalar = mx.ones((1,))

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
        attended = self.self_attn(self.input_layernorm(block), cache, offset, mask)
        block = block + self.post_attention_layernorm(attended)
        mixed = self.mlp(self.pre_feedforward_layernorm(block))
        return (block + self.post_feedforward_layernorm(mixed)) * self.layer_scalar


class _Attention(BlockAttention):
    def __init__(self, config: LayerConfig, scale: float) -> None:
        super().__init__(config, scale)
        self.eps = config.rms_norm_eps

    def norm_values(self, values: mx.array) -> mx.array:
        return mx.fast.rms_norm(values, None, self.eps)


def _read(read: ConfigReader) -> FamilySettings:
    """Read the keys of the target's full-attention layers, which the draft layers copy.

    Experts, per-layer inputs and shared keys and values are the target's alone, so their keys are
    not read; a drafter that had them would have tensors for them, and is refused for those.
    """
    read.one_of("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    # Siblings of full_attention are left-overs of copying the target's config.
    rope = read.part("rope_parameters").part("full_attention")
    shared = read.flag("attention_k_eq_v")
    size = read.count("hidden_size")
    layer = LayerConfig(
        hidden_size=size,
        intermediate_size=read.count("intermediate_size"),
        num_heads=read.count("num_attention_heads"),
        num_kv_heads=read.count("num_global_key_value_heads" if shared else "num_key_value_heads"),
        head_dim=read.count("global_head_dim"),
        rms_norm_eps=read.required("rms_norm_eps"),
        rope_theta=rope.required("rope_theta"),
        rope_scaling={
            "rope_type": rope.one_of("rope_type", "proportional"),
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        },
        max_position_embeddings=read.count("max_position_embeddings"),
        attention_bias=read.get("attention_bias", False),
        values_from_keys=shared,
    )
    return FamilySettings(layer, size**0.5, read.get("final_logit_softcapping"))


FAMILY = Family("Gemma4DSparkModel", DraftLayer, _read)
