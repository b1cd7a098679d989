"""Which attention runs is the cache's choice; what does not attend is left alone."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from dspark_batch.caches.positions import PositionCache
from dspark_batch.models import attention
from dspark_batch.models.attention import let_caches_choose


class Attention(nn.Module):
    def __call__(self, x, cache):
        mask = mx.ones((1, 1, x.shape[2], x.shape[2]), dtype=mx.bool_)
        return scaled_dot_product_attention(x, x, x, cache=cache, scale=1.0, mask=mask)


class Weights(nn.Module):
    """Has no forward pass."""


class Cache(SimpleNamespace):
    """Stands in for one."""


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_is_ours_where_the_cache_is_ragged(ragged, monkeypatch):
    ours = []
    monkeypatch.setattr(attention, "ragged_attention", lambda *given, **more: ours.append(True))
    model = Attention()
    let_caches_choose(model)
    cache = Cache(offset=None, lengths=None, num_seen=3)
    if ragged:
        cache.is_ragged = True
        cache.split = lambda keys, values: (None, keys, values)
        cache.packed = cache.unpacked = lambda heads: heads
    model(mx.ones((1, 2, 3, 4)), cache)
    assert ours == [True] * ragged


def test_the_engines_caches_are_ragged_and_mlx_lms_are_not():
    assert PositionCache.is_ragged
    assert not hasattr(KVCache(), "is_ragged")


def test_modules_without_a_forward_pass_of_their_own_are_left_alone():
    model = Attention()
    model.weights, model.act = Weights(), nn.SiLU()
    let_caches_choose(model)
    assert type(model) is not Attention
    assert (type(model.weights), type(model.act)) == (Weights, nn.SiLU)
