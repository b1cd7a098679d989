"""Which attention runs is the cache's choice; what does not attend is left alone."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.base import scaled_dot_product_attention

from dspark_batch.models import attention
from dspark_batch.models.attention import let_caches_choose


class Attention(nn.Module):
    def __call__(self, x, cache):
        mask = mx.ones((1, 1, x.shape[2], x.shape[2]), dtype=mx.bool_)
        return scaled_dot_product_attention(x, x, x, cache=cache, scale=1.0, mask=mask)


class Weights(nn.Module):
    """Has no forward pass."""


@pytest.mark.parametrize("folds", [False, True])
def test_attention_folds_where_the_cache_says_so(folds, monkeypatch):
    folded = []
    monkeypatch.setattr(attention, "ragged_attention", lambda *given: folded.append(True))
    model = Attention()
    let_caches_choose(model)
    model(mx.ones((1, 2, 3, 4)), SimpleNamespace(folds=folds, offset=None))
    assert folded == [True] * folds


def test_modules_without_a_forward_pass_of_their_own_are_left_alone():
    model = Attention()
    model.weights, model.act = Weights(), nn.SiLU()
    let_caches_choose(model)
    assert type(model) is not Attention
    assert (type(model.weights), type(model.act)) == (Weights, nn.SiLU)
