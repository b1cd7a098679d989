"""Cross entropy and L1 distance with a gradient of their own, against MLX's own derivatives."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from dspark_batch.train.compare import compare

SHAPE = (3, 4, 50)
KEYS = mx.random.split(mx.random.key(3), 5)
LOGITS, KNOWN = (4 * mx.random.normal(SHAPE, key=key) for key in KEYS[:2])
LABELS = mx.random.randint(0, SHAPE[-1], SHAPE[:-1], key=KEYS[2])
ENTROPY, FAR = (mx.random.uniform(shape=SHAPE[:-1], key=key) for key in KEYS[3:])


def plainly(logits, known):
    q, p = mx.softmax(logits, axis=-1), mx.softmax(known, axis=-1)
    distance = mx.abs(q - p).sum(axis=-1)
    return (nn.losses.cross_entropy(logits, LABELS) * ENTROPY).sum() + (distance * FAR).sum()


def compared(logits, known):
    found = compare(logits, known, LABELS)
    return (found.surprise * ENTROPY).sum() + (found.distance * FAR).sum()


def test_value_and_gradient_are_those_of_the_plain_formula():
    value, slope = mx.value_and_grad(compared)(LOGITS, KNOWN)
    expected, expected_slope = mx.value_and_grad(plainly)(LOGITS, KNOWN)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mx.allclose(slope, expected_slope, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_compared_in_float32():
    halves = LOGITS.astype(mx.bfloat16), KNOWN.astype(mx.bfloat16)
    value, slope = mx.value_and_grad(compared)(*halves)
    expected, expected_slope = mx.value_and_grad(plainly)(*(a.astype(mx.float32) for a in halves))
    assert (value.dtype, slope.dtype) == (mx.float32, mx.bfloat16)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert mx.abs(slope - expected_slope).max().item() < 5e-3


def test_a_label_that_is_hopeless_costs_what_it_should_and_not_infinity():
    logits = mx.array([[200.0, 0.0, 0.0]])
    found = compare(logits, mx.zeros((1, 3)), mx.array([1]))
    assert found.surprise.item() == pytest.approx(200.0)
