"""Temperature scaling finds by how much confidences are off, position by position."""

import random
from functools import cache

import pytest

from dspark_batch.numerics.calibration import Round, calibration_errors, fit_temperatures

TRUE = (1.7, 2.5)


def sure(logit):
    return 1 / (1 + 2.718281828459045**-logit)


@cache
def simulated(temperatures, count=4000, seed=0):
    """Rounds in which draft k stays with probability sigmoid(logit / temperature[k])."""
    chance = random.Random(seed)
    rounds = []
    for _ in range(count):
        logits = [chance.gauss(1, 2) for _ in temperatures]
        stayed = [chance.random() < sure(z / t) for z, t in zip(logits, temperatures, strict=True)]
        rounds.append(Round(logits, [*stayed, False].index(False)))
    return rounds


def test_the_temperatures_that_made_the_rounds_are_found():
    assert fit_temperatures(simulated(TRUE)) == pytest.approx(TRUE, rel=0.2)


def test_the_error_falls_at_every_position_that_was_off_on_rounds_that_were_not_fitted():
    found, others = fit_temperatures(simulated(TRUE)), simulated(TRUE, seed=1)
    before = calibration_errors(others, [1.0] * 2)
    after = calibration_errors(others, found)
    for position in range(2):
        assert after[position] < 0.5 * before[position]
        assert after[position] < 0.03


def test_confidences_that_are_right_stay_as_they_are():
    assert fit_temperatures(simulated((1.0, 1.0))) == pytest.approx((1.0, 1.0), rel=0.1)


def test_a_position_is_fitted_with_the_ones_before_it_kept():
    rounds = simulated(TRUE, 500)
    first = [Round(r.confidence[:1], min(r.num_accepted, 1)) for r in rounds]
    assert fit_temperatures(first) == fit_temperatures(rounds)[:1]


def test_the_error_is_of_the_survival_of_the_whole_prefix():
    # Two drafts that stay in half of the rounds each: both together in a quarter.
    rounds = [Round([0.0, 0.0], accepted) for accepted in (0, 0, 1, 2)]
    assert calibration_errors(rounds, [1.0, 1.0]) == (0.0, 0.0)
    always = [Round([0.0, 0.0], 2)] * 4
    assert calibration_errors(always, [1.0, 1.0]) == (0.5, 0.75)


def test_drafts_that_were_not_verified_say_nothing():
    rounds = [Round([0.0, 0.0], 2), Round([0.0], 0), Round([], 0)]
    assert calibration_errors(rounds, [1.0, 1.0]) == (0.0, 0.75)


def test_no_rounds_have_no_temperatures():
    assert fit_temperatures([]) == ()


def test_extreme_logits_are_no_overflow():
    assert fit_temperatures([Round([1e4], 1), Round([-1e4], 0)] * 3) == (1.0,)
