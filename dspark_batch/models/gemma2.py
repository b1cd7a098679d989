"""Gemma 2: the scores of its attention are capped, in code that knows one sequence only."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gemma2 import Attention

from dspark_batch.caches.positions import PositionCache
from dspark_batch.numerics.attention import ragged_attention


def _attend(self: nn.Module, x: mx.array, mask: mx.array, cache: PositionCache) -> mx.array:
    """Do what `Attention.__call__` does, over slots of different lengths."""
    batch, width, _ = x.shape
    queries, keys, values = (
        project(x).reshape(batch, width, heads, self.head_dim).swapaxes(1, 2)
        for project, heads in (
            (self.q_proj, self.n_heads),
            (self.k_proj, self.n_kv_heads),
            (self.v_proj, self.n_kv_heads),
        )
    )
    queries = self.rope(queries, offset=cache.offset)
    keys = self.rope(keys, offset=cache.offset)
    beginning, keys, values = cache.split(*cache.update_and_fetch(keys, values))
    where, cap = (keys, values, self.scale, mask, cache.lengths), self.attn_logit_softcapping
    more = {"is_causal": True, "softcap": cap, "beginning": beginning}
    attended = cache.packed(ragged_attention(cache.unpacked(queries), *where, **more))
    return self.o_proj(attended.swapaxes(1, 2).reshape(batch, width, -1))


FORWARDS = {Attention: _attend}
