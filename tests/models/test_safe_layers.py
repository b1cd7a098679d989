"""Layers keep place and parameters, and give a row its bits whatever others there are."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.numerics import rows
from dspark_batch.numerics.rows import as_they_come


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(70, 64)
        self.plain = nn.Linear(64, 64, bias=False)
        self.biased = nn.Linear(64, 40)
        self.quantised = nn.Linear(64, 64).to_quantized(32, 4)

    def __call__(self, tokens):
        hidden = self.quantised(self.plain(self.embed(tokens)))
        return self.biased(hidden), self.embed.as_linear(hidden)


@pytest.fixture
def model():
    mx.random.seed(7)  # noqa: TID251  weights only
    made = Model()
    mx.eval(made.parameters())
    return made


TOKENS = mx.array([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])


def bits(array):
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def test_a_model_says_what_it_said_within_rounding(model):
    before = model(TOKENS)
    make_rows_safe(model)
    after = model(TOKENS)
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))
    assert [a.shape for a in before] == [a.shape for a in after]


def test_parameters_and_names_stay(model):
    before = dict(tree_flatten(model.parameters()))
    make_rows_safe(model)
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(after[name] is array for name, array in before.items())
    assert type(model.plain).__name__ == "Linear"
    assert isinstance(model.plain, nn.Linear)
    assert isinstance(model.quantised, nn.QuantizedLinear)


def test_other_models_of_the_same_classes_notice_nothing(model):
    make_rows_safe(model)
    assert type(nn.Linear(2, 2)) is nn.Linear
    assert type(model.plain) is not nn.Linear


def test_twice_is_once(model):
    make_rows_safe(model)
    kinds = [type(module) for module in model.modules()]
    make_rows_safe(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_row_has_its_bits_alone_and_with_others(model, dtype):
    model.set_dtype(dtype)
    make_rows_safe(model)
    together = model(TOKENS)
    for slot in range(3):
        for place in range(4):
            alone = model(TOKENS[slot : slot + 1, place : place + 1])
            for a, b in zip(alone, together, strict=True):
                assert bits(a) == bits(b[slot : slot + 1, place : place + 1])


def test_mlx_lms_own_way_is_what_it_would_be_without(model):
    before = model(TOKENS)
    make_rows_safe(model)
    with as_they_come():
        after = model(TOKENS)
    assert [bits(a) for a in before] == [bits(a) for a in after]


def test_the_size_of_each_product_is_asked_about(model, monkeypatch):
    asked = []
    monkeypatch.setattr(rows, "pieces", lambda product, count: asked.append(product) or (count,))
    make_rows_safe(model)
    mx.eval(model(TOKENS))
    assert [(p.size, p.width, p.has_bias, p.quantised) for p in asked] == [
        (64, 64, False, None),
        (64, 64, True, (4, 32, "affine")),
        (64, 40, True, None),
        (64, 70, False, None),
    ]
    assert {p.dtype for p in asked} == {"float32"}


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(70, 64)

    def __call__(self, tokens, cache):
        return self.embed_tokens(tokens)


class RawHead(nn.Module):
    """Multiplies by its embedding's weight, as seed_oss does."""

    def __init__(self):
        super().__init__()
        self.model = Body()

    def __call__(self, inputs, cache=None):
        return self.model(inputs, cache) @ self.model.embed_tokens.weight.T


def test_a_head_that_is_a_raw_product_runs_over_safe_rows(monkeypatch):
    mx.random.seed(7)  # noqa: TID251  weights only
    model, asked = RawHead(), []
    before = model(TOKENS)
    make_rows_safe(model)
    monkeypatch.setattr(rows, "pieces", lambda product, count: asked.append(product) or (count,))
    assert mx.allclose(model(TOKENS), before, atol=1e-5)
    assert [(p.size, p.width) for p in asked] == [(64, 70)]


class CappedHead(RawHead):
    def __call__(self, inputs, cache=None):
        logits = self.model(inputs, cache) @ self.model.embed_tokens.weight.T
        return mx.tanh(logits * 3.0)


def test_a_head_that_does_more_keeps_its_code():
    model = CappedHead()
    before = model(TOKENS)
    make_rows_safe(model)
    assert type(model) is CappedHead
    assert mx.allclose(model(TOKENS), before)


def test_a_model_with_a_head_beside_its_embedding_keeps_its_code():
    model = RawHead()
    model.lm_head = nn.Linear(64, 70)
    make_rows_safe(model)
    assert type(model) is RawHead


# In strips, where rows of large products depend on their place


@pytest.fixture
def in_strips(monkeypatch):
    """Let every dense product run in strips."""
    every = [rows.Product("float32", 64, width, has_bias=width == 40) for width in (64, 40, 70)]
    monkeypatch.setattr(rows, "_in_strips", {p: p._replace(in_strips=True) for p in every})


def strips_of(model):
    return [module for module in model.modules() if getattr(module, "_strips", None)]


def test_in_strips_a_model_says_what_it_said_within_rounding(model, in_strips):
    before = model(TOKENS)
    make_rows_safe(model)
    after = model(TOKENS)
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))
    assert strips_of(model) == [model.biased, model.plain, model.embed]
    with as_they_come():
        assert [bits(a) for a in before] == [bits(a) for a in model(TOKENS)]


def test_strips_are_no_parameters_and_change_none(model, in_strips):
    before = dict(tree_flatten(model.parameters()))
    make_rows_safe(model)
    mx.eval(model(TOKENS))
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(after[name], array) for name, array in before.items())


def test_mlx_lms_own_way_makes_no_strips(model, in_strips):
    make_rows_safe(model)
    with as_they_come():
        mx.eval(model(TOKENS))
    assert strips_of(model) == []


def test_strips_are_made_once_for_a_weight(model, in_strips):
    make_rows_safe(model)
    mx.eval(model(TOKENS))
    known = [module._strips for module in strips_of(model)]
    mx.eval(model(TOKENS))
    assert [module._strips for module in strips_of(model)] == known
    model.update({"plain": {"weight": mx.zeros((64, 64))}})  # as loading other weights does
    logits = model(TOKENS)[1].reshape(-1, 70)
    assert mx.array_equal(logits, mx.broadcast_to(logits[:1], logits.shape))  # all tokens are alike


@pytest.mark.parametrize("is_quantised", [False, True])
def test_experts_give_a_token_its_bits_whoever_else_wants_them(is_quantised):
    mx.random.seed(8)  # noqa: TID251  weights only
    experts = SwitchGLU(64, 64, 8)
    if is_quantised:
        nn.quantize(experts, 32, 4)
    mx.eval(experts.parameters())
    hidden = mx.random.normal((5, 20, 64), key=mx.random.key(1))
    chosen = mx.random.randint(0, 8, (5, 20, 2), key=mx.random.key(2))
    before = experts(hidden, chosen)
    make_rows_safe(experts)
    together = experts(hidden, chosen)
    assert mx.allclose(before, together, atol=1e-4)
    for slot, place in ((0, 0), (4, 19), (2, 7)):
        for width in (1, min(3, 20 - place)):
            where = (slice(slot, slot + 1), slice(place, place + width))
            assert bits(experts(hidden[where], chosen[where])) == bits(together[where])
