"""Filters against a slow definition; draws against their distribution."""

import mlx.core as mx
import numpy as np
import pytest
from chi_square import chi_square_excess

from dspark_batch import device
from dspark_batch.numerics.sampling import (
    Filters,
    Settings,
    are_finite,
    draw,
    probabilities,
    scaled_logits,
)


def settings(temperature, top_k=0, top_p=1.0, min_p=0.0, slots=1):
    filters = Filters(
        mx.array([top_k] * slots), mx.array([top_p] * slots), mx.array([min_p] * slots)
    )
    return Settings(mx.array([float(temperature)] * slots), filters)


def logits_of(*weights):
    return mx.log(mx.array(weights))[None, None]


def kept(logits, **choices):
    """Which tokens of the only row may be said."""
    scaled = scaled_logits(logits, settings(choices.pop("temperature", 1.0), **choices))
    return np.flatnonzero(np.isfinite(np.array(scaled[0, 0]))).tolist()


def slowly_kept(logits, temperature, top_k, top_p, min_p):
    """One token after the other, in Python's own numbers."""
    scaled = [x / temperature for x in np.array(logits, np.float64)[0, 0]]
    left = [x for x in scaled if x >= max(scaled) + (np.log(min_p) if min_p else -np.inf)]
    left = sorted(left, reverse=True)[: top_k or None]
    whole, mass, nucleus = sum(map(np.exp, left)), 0.0, []
    for x in left:
        if mass / whole >= top_p:
            break
        nucleus.append(x)
        mass += np.exp(x)
    return [i for i, x in enumerate(scaled) if x >= nucleus[-1]]


@pytest.mark.parametrize("seed", range(12))
def test_filters_keep_what_their_definition_keeps(seed):
    logits = 2 * mx.random.normal((1, 1, 40), key=mx.random.key(seed))
    chosen = np.random.default_rng(seed)
    choices = {
        "temperature": float(chosen.uniform(0.3, 1.5)),
        "top_k": int(chosen.integers(0, 12)),
        "top_p": float(chosen.uniform(0.2, 1)),
        "min_p": float(chosen.choice([0, 0.05, 0.2])),
    }
    assert kept(logits, **choices) == slowly_kept(logits, **choices)


def test_each_filter_alone():
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_p=0.65) == [1, 3]
    assert kept(logits, top_p=0.75) == [1, 2, 3]
    assert kept(logits, min_p=0.6) == [1, 3]
    assert kept(logits, min_p=1.0) == kept(logits, top_k=1) == kept(logits, top_p=0.01) == [1]
    assert kept(logits, top_p=1e-300) == [1]  # 0 as a float32


def test_the_temperature_comes_before_the_nucleus():
    logits = logits_of(0.6, 0.3, 0.1)
    assert kept(logits, top_p=0.65) == [0, 1]
    assert kept(logits, top_p=0.65, temperature=0.5) == [0]


def test_the_nucleus_is_a_share_of_what_top_k_left():
    assert kept(logits_of(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.55) == [0]


def test_tokens_as_likely_as_the_last_one_that_stays_stay_too():
    logits = mx.array([[[1.0, 3.0, 2.0, 2.0, 2.0]]])
    assert kept(logits, top_k=2) == kept(logits, top_p=0.5) == [1, 2, 3, 4]


def test_more_tokens_than_there_are_is_all_of_them():
    assert kept(logits_of(0.5, 0.5), top_k=99) == [0, 1]


def test_no_filter_loses_no_rare_token():
    logits = mx.concatenate([mx.array([20.0]), mx.zeros(1000)])[None, None]
    assert len(kept(logits)) == 1001


def test_filters_and_temperatures_of_neighbours_do_not_mix():
    logits = mx.random.normal((3, 2, 30), key=mx.random.key(3))
    filters = Filters(mx.array([3, 0, 0]), mx.array([1.0, 0.5, 1.0]), mx.array([0.0, 0.0, 0.0]))
    together = scaled_logits(logits, Settings(mx.array([0.5, 2.0, 0.0]), filters))
    alone = [
        scaled_logits(logits[:1], settings(0.5, top_k=3)),
        scaled_logits(logits[1:2], settings(2.0, top_p=0.5)),
        logits[2:],
    ]
    assert mx.array_equal(together, mx.concatenate(alone))


def test_a_greedy_slot_has_all_its_probability_on_the_first_of_the_most_likely():
    logits = mx.array([[[1.0, 5.0, 5.0]], [[1.0, 5.0, 5.0]]])
    p = probabilities(logits, Settings(mx.array([0.0, 1.0])))
    assert p[0, 0].tolist() == [0, 1, 0]
    assert p[1, 0, 1].item() == p[1, 0, 2].item() < 0.5


def test_probabilities_are_float32_softmax_of_whatever_type():
    logits = mx.array([[[1.0, 2.0, -1.0]]])
    p = probabilities(logits.astype(mx.bfloat16), Settings(mx.array([2.0])))
    assert p.dtype == mx.float32
    assert mx.allclose(p, mx.softmax(logits / 2, axis=-1)).item()


def test_a_draw_is_the_first_token_whose_cumulative_weight_exceeds_the_share():
    weights = mx.array([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0]] * 7)
    shares = mx.array([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-24, 1.0])
    assert draw(weights, shares).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_draws_follow_the_weights():
    weights = mx.array([3.0, 0.0, 1.0, 0.5, 5.5])
    drawn = draw(mx.broadcast_to(weights, (40_000, 5)), (mx.arange(40_000) + 0.5) / 40_000)
    counts = np.bincount(np.array(drawn), minlength=5)
    assert chi_square_excess(counts, np.array(weights) * 4000) < 0


@pytest.mark.parametrize("seed", range(3))
def test_nothing_impossible_is_drawn_from_a_large_vocabulary(seed):
    weights = mx.random.uniform(shape=(64, 20_000), key=mx.random.key(seed))
    weights = mx.where(weights > 0.999, weights, 0.0)
    shares = mx.random.uniform(shape=(64,), key=mx.random.key(seed + 9))
    drawn = draw(weights, mx.maximum(shares, mx.array([0.0, 1.0] * 32)))
    assert mx.all(mx.take_along_axis(weights, drawn[:, None], axis=1) > 0).item()


@pytest.mark.parametrize("bad", [mx.nan, mx.inf, -mx.inf])
def test_one_logit_that_is_no_number_spoils_its_position_only(bad):
    logits = mx.zeros((2, 3, 5), dtype=mx.bfloat16)
    logits[1, 2, 4] = bad
    assert are_finite(logits).tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_each_way_sees_what_is_no_number_wherever_it_stands(monkeypatch, value, is_cpu, dtype):
    monkeypatch.setattr(device, "is_cpu", lambda: is_cpu)
    for place in (0, 7, 300):
        logits = mx.zeros((2, 301), dtype=dtype)
        logits[1, place] = value
        assert are_finite(logits).tolist() == [True, False]
