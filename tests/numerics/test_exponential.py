"""Exponentials agree with their definition, and a number's bits do not depend on its place."""

import math
import platform

import mlx.core as mx
import numpy as np
import pytest

from dspark_batch.numerics import exponential
from dspark_batch.numerics.exponential import exp, swiglu

on_a_cpu = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="a GPU has exponentials of its own"
)

EXTREMES = [-3.4e38, -200.0, -90.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 3.4e38]


def numbers_between(low, high):
    return mx.linspace(low, high, 10_001)


def test_exponentials_are_those_of_float64():
    numbers = numbers_between(-30, 30)
    expected = np.exp(np.array(numbers, dtype=np.float64))
    assert np.array(exp(numbers)) == pytest.approx(expected, rel=2e-6)


@on_a_cpu
def test_a_cpu_has_more_places_and_the_whole_range():
    numbers = numbers_between(-87, 88)
    expected = np.exp(np.array(numbers, dtype=np.float64))
    assert np.array(exp(numbers)) == pytest.approx(expected, rel=3e-7)
    assert exp(mx.array([-89.0, -104.0, -1e30])).tolist() == [0.0, 0.0, 0.0]


@on_a_cpu
@pytest.mark.skipif(platform.machine() != "x86_64", reason="another compiler may join two steps")
def test_steps_that_no_compiler_joins_give_the_same_bits():
    numbers = numbers_between(-100, 80)[:9_999]  # of a shape that no other test has
    joined = exp(numbers)
    mx.eval(joined)
    mx.disable_compile()
    try:
        assert mx.array_equal(exp(numbers), joined)
    finally:
        mx.enable_compile()


@on_a_cpu
def test_the_slope_of_an_exponential_is_itself():
    numbers = numbers_between(-30, 5)
    assert mx.array_equal(mx.grad(lambda numbers: exp(numbers).sum())(numbers), exp(numbers))


@on_a_cpu
def test_loops_are_kept_for_few_shapes():
    numbers = mx.zeros((300, 1))
    for length in range(1, 301):  # two loops each
        exp(numbers[:length])
    assert exponential._loop.cache_info().currsize == 512


def test_what_is_hidden_weighs_nothing_and_what_is_highest_weighs_one():
    weights = exp(mx.array([mx.finfo(mx.float32).min, -math.inf, 0.0, math.nan]))
    assert weights[:3].tolist() == [0.0, 0.0, 1.0]
    assert math.isnan(weights[3].item())


def test_swiglu_is_its_definition():
    gate, up = numbers_between(-20, 20), numbers_between(3, -2)
    wide = np.array(gate, dtype=np.float64)
    expected = wide / (1 + np.exp(-wide)) * np.array(up, dtype=np.float64)
    assert np.array(swiglu(gate, up)) == pytest.approx(expected, rel=2e-6, abs=1e-9)


def test_swiglu_of_extremes_and_its_slope_are_numbers():
    gate = mx.array(EXTREMES)
    expected = [max(number, 0.0) for number in EXTREMES]
    assert swiglu(gate, mx.ones_like(gate)).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    slope = mx.grad(lambda gate: swiglu(gate, mx.ones_like(gate)).sum())(mx.array(EXTREMES[1:-1]))
    assert mx.isfinite(slope).all().item()


def test_swiglu_hides_no_fault():
    assert math.isnan(swiglu(mx.array([math.nan]), mx.ones(1)).item())


def test_swiglu_keeps_the_number_type():
    gate = mx.array([1.0, -2.0], dtype=mx.bfloat16)
    assert swiglu(gate, gate).dtype == mx.bfloat16


def test_a_number_gets_the_same_bits_in_every_place():
    rows = mx.random.normal((48, 65), key=mx.random.key(3)) * 5
    whole, turned = swiglu(rows, rows), swiglu(rows.T, rows.T).T
    assert mx.array_equal(whole, turned)
    for place in (0, 17, 47):
        assert mx.array_equal(whole[place], swiglu(rows[place], rows[place]))
        alone = exp(rows[place, 3:4])
        assert mx.array_equal(exp(rows)[place, 3:4], alone)
