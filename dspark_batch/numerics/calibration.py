"""Sequential Temperature Scaling: confidences that say how often drafts are really accepted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

_BINS = 20
_STEPS_PER_OCTAVE = 15
# 1/4 to 4, evenly on a logarithmic scale; 1 is one of them.
_GRID = [2 ** (step / _STEPS_PER_OCTAVE) for step in range(-30, 31)]


class Round(NamedTuple):
    """One logged round of one slot."""

    confidence: Sequence[float]  # logits, one for each verified draft
    num_accepted: int  # leading drafts that stayed


class _Draft(NamedTuple):
    """One draft at the position that is being fitted."""

    before: float  # estimated probability that all earlier drafts stay
    logit: float
    stayed: bool  # it and all before it


def fit_temperatures(rounds: Sequence[Round]) -> tuple[float, ...]:
    """Fit a temperature for each block position, from left to right.

    Each is the one of a grid that gives the survival of the prefix up to its position, the product
    of the confidences, the least calibration error, with those before it kept.

    Args:
        rounds: whole ones; a round that a limit cut says nothing about its last draft.

    Returns:
        By position, as many as the longest round has.

    Source:
        DSpark, Sequential Temperature Scaling; it leaves grid and bins open.
    """
    temperatures: list[float] = []
    for _ in range(_longest(rounds)):
        drafts = _drafts_behind(rounds, temperatures)
        errors = {t: _calibration_error(drafts, t) for t in _GRID}
        # Among equals the one that changes least.
        best = min(_GRID, key=lambda t: (errors[t], abs(math.log(t))))
        temperatures.append(best)
    return tuple(temperatures)


def calibration_errors(rounds: Sequence[Round], temperatures: Sequence[float]) -> tuple[float, ...]:
    """Measure the expected calibration error of prefix survival at each block position.

    Source:
        DeepSpec's evaluator: 20 equal bins over [0, 1].
    """
    return tuple(
        _calibration_error(_drafts_behind(rounds, temperatures[:k]), temperatures[k])
        for k in range(min(_longest(rounds), len(temperatures)))
    )


def _drafts_behind(rounds: Sequence[Round], temperatures: Sequence[float]) -> list[_Draft]:
    """Collect the drafts at the position behind those that have a temperature."""
    k = len(temperatures)
    return [
        _Draft(math.prod(map(_probability, confidence, temperatures)), confidence[k], accepted > k)
        for confidence, accepted in rounds
        if len(confidence) > k
    ]


def _calibration_error(drafts: Sequence[_Draft], temperature: float) -> float:
    surplus = [0.0] * _BINS  # by bin: drafts that should have stayed, less those that did
    for draft in drafts:
        survival = draft.before * _probability(draft.logit, temperature)
        surplus[min(int(survival * _BINS), _BINS - 1)] += survival - draft.stayed
    return sum(map(abs, surplus)) / len(drafts)


def _probability(logit: float, temperature: float) -> float:
    """Apply the logistic function to logit / temperature, at any size."""
    return 0.5 * (1 + math.tanh(0.5 * logit / temperature))


def _longest(rounds: Sequence[Round]) -> int:
    return max((len(r.confidence) for r in rounds), default=0)
