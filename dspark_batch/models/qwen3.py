"""The draft layer of the Qwen3 family, as DeepSpec's Qwen3DSparkModel has it."""

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.rope_utils import initialize_rope

from dspark_batch.models.drafter_config import DrafterConfig


class KeyValues(Protocol):
    """Where one layer's keys and values live; mlx-lm's caches fit too."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put [B, KV, T, D] behind what is there; return everything, [B, KV, S, D] each."""


class DraftLayer(nn.Module):
    """One layer of the drafter: queries from the block, keys and values from context and block."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def keys_values(self, hidden: mx.array, offset: mx.array) -> tuple[mx.array, mx.array]:
        """Project [B, A*T, E], A runs of T positions that start at offset [B, A].

        Returns:
            Keys, rotated to their positions, and values: [B, KV, A*T, D] each.
        """
        return self.self_attn.keys_values(hidden, offset)

    def __call__(
        self, block: mx.array, cache: KeyValues, offset: mx.array, mask: mx.array
    ) -> mx.array:
        """Run blocks [B, A*K, E] that start at offset [B, A]; mask broadcasts to the scores."""
        block = block + self.self_attn(self.input_layernorm(block), cache, offset, mask)
        return block + self.mlp(self.post_attention_layernorm(block))


class _Attention(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = head_dim**-0.5
        bias = config.attention_bias
        self.q_proj = nn.Linear(size, self.num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(size, self.num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(size, self.num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * head_dim, size, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.rope = initialize_rope(
            head_dim,
            base=config.rope_theta,
            traditional=False,
            scaling_config=config.rope_parameters,
            max_position_embeddings=config.max_position_embeddings,
        )

    def keys_values(self, hidden: mx.array, offset: mx.array) -> tuple[mx.array, mx.array]:
        keys = self.k_norm(_split_heads(self.k_proj(hidden), self.num_kv_heads))
        values = _split_heads(self.v_proj(hidden), self.num_kv_heads)
        return _rotate(self.rope, keys, offset), values.transpose(0, 2, 1, 3)

    def __call__(
        self, hidden: mx.array, cache: KeyValues, offset: mx.array, mask: mx.array
    ) -> mx.array:
        queries = self.q_norm(_split_heads(self.q_proj(hidden), self.num_heads))
        keys, values = cache.update_and_fetch(*self.keys_values(hidden, offset))
        attended = mx.fast.scaled_dot_product_attention(
            _rotate(self.rope, queries, offset), keys, values, scale=self.scale, mask=mask
        )
        return self.o_proj(attended.transpose(0, 2, 1, 3).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def __call__(self, hidden: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(hidden), self.up_proj(hidden)))


def _split_heads(projected: mx.array, num_heads: int) -> mx.array:
    return projected.reshape(*projected.shape[:2], num_heads, -1)


def _rotate(rope: nn.Module, heads: mx.array, offset: mx.array) -> mx.array:
    """Rotate [B, A*T, N, D], A runs that start at offset [B, A]; return [B, N, A*T, D]."""
    batch, total, num_heads, dim = heads.shape
    runs = offset.shape[1]
    heads = heads.reshape(batch * runs, total // runs, num_heads, dim).transpose(0, 2, 1, 3)
    heads = rope(heads, offset=offset.reshape(-1))
    heads = heads.reshape(batch, runs, num_heads, total // runs, dim).transpose(0, 2, 1, 3, 4)
    return heads.reshape(batch, num_heads, total, dim)
