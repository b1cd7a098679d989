"""Multi-head latent attention, of DeepSeek V3 and its kin.

mlx-lm computes it in two ways: a step of one token multiplies queries into the latent space, a
wider step multiplies the latents out to keys and values. Their bits differ. Here every step does
what mlx-lm does for one token. That is attention with a single key head: its keys are the latents
with the rotated part behind them, its values are the latents.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v3, glm4_moe_lite

from dspark_batch.caches.positions import PositionCache
from dspark_batch.numerics.attention import ragged_attention


def _attend(self: nn.Module, x: mx.array, mask: mx.array, cache: PositionCache) -> mx.array:
    """Do what `DeepseekV3Attention.__call__` does, over slots of different lengths.

    Source:
        DeepSeek-V2 (arXiv:2405.04434), section 2.1: the products with the weights of keys and
        values are absorbed into those of queries and outputs.
    """
    batch, width, _ = x.shape
    if self.q_lora_rank is None:
        queries = self.q_proj(x)
    else:
        queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
    queries = queries.reshape(batch, width, self.num_heads, self.q_head_dim).swapaxes(1, 2)
    plain, rotated = mx.split(queries, [self.qk_nope_head_dim], axis=-1)
    latent, key = mx.split(self.kv_a_proj_with_mqa(x), [self.kv_lora_rank], axis=-1)
    latent = self.kv_a_layernorm(latent)[:, None]
    rotated = self.rope(rotated, cache.offset)
    key = self.rope(key[:, None], cache.offset)
    shared, latents, keys = cache.split(*cache.update_and_fetch(latent, key))
    queries = mx.concatenate([self.embed_q(plain), rotated], axis=-1)
    beginning = shared and (mx.concatenate([*shared], axis=-1), shared.keys)
    keys = mx.concatenate([latents, keys], axis=-1)
    where, queries = (keys, latents, self.scale, mask, cache.lengths), cache.unpacked(queries)
    attended = ragged_attention(queries, *where, is_causal=True, beginning=beginning)
    attended = self.unembed_out(cache.packed(attended))
    return self.o_proj(attended.swapaxes(1, 2).reshape(batch, width, -1))


FORWARDS = {
    deepseek_v3.DeepseekV3Attention: _attend,
    glm4_moe_lite.Glm4MoeLiteAttention: _attend,
}
