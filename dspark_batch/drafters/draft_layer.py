"""What the draft layers of all families share: projections, positions, attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from dspark_batch.models.attention import attend
from dspark_batch.models.config_reader import ConfigReader


class KeyValues(Protocol):
    """Where one layer's keys and values live; mlx-lm's caches fit too."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put [B, KV, T, D] behind what is there; return everything, [B, KV, S, D] each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """The sizes and the positions of one draft layer."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None  # as mlx-lm's initialize_rope reads it; None: plain
    max_position_embeddings: int
    attention_bias: bool = False
    values_from_keys: bool = False  # no v_proj: values are the raw key projection


class FamilySettings(NamedTuple):
    """What a family reads out of a drafter's config."""

    layer: LayerConfig
    embed_scale: float = 1.0  # of the anchor's and the masks' embeddings
    logit_softcap: float | None = None  # of the base logits; None: no cap


class Family(NamedTuple):
    """What differs between model families around the same drafter."""

    architecture: str  # what DeepSpec writes as architectures[0]
    draft_layer: Callable[[LayerConfig], nn.Module]
    read: Callable[[ConfigReader], FamilySettings]


class BlockAttention(nn.Module):
    """Queries from the block, keys and values from context and block.

    Args:
        config: sizes.
        scale: of the scores.
    """

    def __init__(self, config: LayerConfig, scale: float) -> None:
        super().__init__()
        size, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.scale = scale
        self.q_proj = nn.Linear(size, self.num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(size, self.num_kv_heads * head_dim, bias=bias)
        if not config.values_from_keys:
            self.v_proj = nn.Linear(size, self.num_kv_heads * head_dim, bias=bias)
        self.values_from_keys = config.values_from_keys
        self.o_proj = nn.Linear(self.num_heads * head_dim, size, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.rope = initialize_rope(
            head_dim,
            base=config.rope_theta,
            traditional=False,
            scaling_config=None if config.rope_scaling is None else dict(config.rope_scaling),
            max_position_embeddings=config.max_position_embeddings,
        )

    def keys_values(self, hidden: mx.array, offset: mx.array) -> tuple[mx.array, mx.array]:
        """Project [B, A*T, E], A runs of T positions that start at offset [B*A].

        Returns:
            Keys, rotated to their positions, and values: [B, KV, A*T, D] each.
        """
        projected = _split_heads(self.k_proj(hidden), self.num_kv_heads)
        values = projected
        if not self.values_from_keys:
            values = _split_heads(self.v_proj(hidden), self.num_kv_heads)
        keys = _rotate(self.rope, self.k_norm(projected), offset)
        return keys, self.norm_values(values).transpose(0, 2, 1, 3)

    def norm_values(self, values: mx.array) -> mx.array:
        """Normalise values [..., D]; a family that does so overrides this."""
        return values

    def __call__(
        self, hidden: mx.array, cache: KeyValues, offset: mx.array, mask: mx.array
    ) -> mx.array:
        """Attend from blocks [B, A*K, E] that start at offset [B*A]; see `keys_values`."""
        queries = self.q_norm(_split_heads(self.q_proj(hidden), self.num_heads))
        keys, values = cache.update_and_fetch(*self.keys_values(hidden, offset))
        queries = _rotate(self.rope, queries, offset)
        attended = attend(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(attended.transpose(0, 2, 1, 3).flatten(2))


class GatedMlp(nn.Module):
    """`down(glu(gate(x), up(x)))`, where glu activates its first input and multiplies."""

    def __init__(self, config: LayerConfig, glu: Callable[[mx.array, mx.array], mx.array]) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.glu = glu
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def __call__(self, hidden: mx.array) -> mx.array:
        """Map [..., E] to [..., E]."""
        return self.down_proj(self.glu(self.gate_proj(hidden), self.up_proj(hidden)))


def _split_heads(projected: mx.array, num_heads: int) -> mx.array:
    return projected.reshape(*projected.shape[:2], num_heads, -1)


def _rotate(rope: nn.Module, heads: mx.array, offset: mx.array) -> mx.array:
    """Rotate [B, A*T, N, D], A runs that start at offset [B*A]; return [B, N, A*T, D]."""
    batch, total, num_heads, dim = heads.shape
    runs = offset.shape[0] // batch
    heads = heads.reshape(batch * runs, total // runs, num_heads, dim).transpose(0, 2, 1, 3)
    heads = rope(heads, offset=offset)
    heads = heads.reshape(batch, runs, num_heads, total // runs, dim).transpose(0, 2, 1, 3, 4)
    return heads.reshape(batch, num_heads, total, dim)
