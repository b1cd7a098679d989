"""Joined projections compute what the layers computed that they stand for."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from golden_cases import load_case

from dspark_batch.engine.cache import RaggedCache
from dspark_batch.models.joined import OF_DRAFTER, OF_TARGET, join_projections
from dspark_batch.numerics.rules import Greedy


def logits_and_draft(pair):
    cache, context = RaggedCache(pair.target.num_caches, 2), RaggedCache(pair.drafter.num_layers, 2)
    for each in (cache, context):
        each.reserve(32)
    logits, features = pair.target(mx.array([[5, 6, 7], [8, 9, 10]]), cache.layers)
    pair.drafter.extend(context, features)
    for each in (cache, context):
        each.keep(mx.array([3, 2]))
    draft = pair.drafter.propose(mx.array([11, 12]), context, 3, Greedy().draft)
    return logits, draft.logits


@pytest.mark.parametrize("name", ["qwen3_vanilla", "gemma4_vanilla"])
def test_a_joined_pair_gives_the_logits_of_the_plain_one(name):
    plain = logits_and_draft(load_case(name).pair)
    joined = load_case.__wrapped__(name).pair  # its own copy: joining stays
    join_projections(joined.target.model, OF_TARGET)
    join_projections(joined.drafter, OF_DRAFTER)
    kinds = {type(m).__name__ for m in joined.target.model.modules()}
    assert "_Part" in kinds
    for a, b in zip(plain, logits_and_draft(joined), strict=True):
        assert mx.allclose(a, b, atol=1e-4)


def test_two_inputs_in_turn_are_not_confused():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(4, 3, bias=False) for _ in range(2))

    plain = Mlp()
    gate, up = plain.gate_proj, plain.up_proj
    join_projections(plain, OF_TARGET)
    a, b = mx.random.normal((2, 4)), mx.random.normal((2, 4))
    for first, second in ((a, b), (b, a), (a, a)):
        assert mx.allclose(plain.gate_proj(first), gate(first), atol=1e-6)
        assert mx.allclose(plain.up_proj(second), up(second), atol=1e-6)


def test_layers_with_a_bias_and_quantised_ones_stay():
    for make in (
        lambda: nn.Linear(64, 64),
        lambda: nn.QuantizedLinear.from_linear(nn.Linear(64, 64, bias=False)),
    ):
        model = nn.Module()
        model.gate_proj, model.up_proj = make(), make()
        before = type(model.gate_proj)
        join_projections(model, OF_TARGET)
        assert type(model.gate_proj) is before
