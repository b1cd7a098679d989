"""Contestants that decode by turns in one process.

A machine that becomes slower, as virtual ones do for seconds or minutes, is slower for all of them.
"""

import time
from statistics import median

import mlx.core as mx

from dspark_batch.engine.engine import Engine

TURN_S = 0.1  # shorter than the moments in which a shared machine is slow
BEHIND = 0.8  # of the best; a fixed plan that is slower leaves after a fifth of the job


class Contestant:
    """An engine with a job, that decodes when it is its turn."""

    def __init__(self, pair, work, **settings):
        self._engine = Engine(pair, **settings)
        for request in work:
            self._engine.add(request)
        self._left = time.perf_counter()
        self._rounds = 0
        self.seconds = 0.0
        self.answers = {}

    @property
    def is_done(self):
        return self._engine.is_idle

    def turn(self):
        """Decode for a while."""
        began = time.perf_counter()
        self._engine.leave_out(began - self._left)
        while time.perf_counter() - began < TURN_S and not self.is_done:
            for answer in self._engine.step():
                self.answers[answer.item.index] = answer.token_ids
                self._rounds += len(answer.accept_lengths)
        mx.synchronize()  # its round ends in its own time
        self._left = time.perf_counter()
        self.seconds += self._left - began

    @property
    def rate(self):
        """Tokens per second, those of answers that go on included."""
        growing = self._engine._slots.active
        return (self._finished() + sum(len(each.token_ids) for each in growing)) / self.seconds

    @property
    def accept_length(self):
        return round(self._finished() / max(1, self._rounds), 2)

    def _finished(self):
        return sum(map(len, self.answers.values()))


def compete_often(make_fixed, make_auto, work, repeats):
    """Let contestants compete some times, each time from the start; give medians.

    The best of some noisy rates is too high, and the more so, the fewer readings of each there are.

    Args:
        make_fixed: makes the contestants by name.
        make_auto: makes the one that is compared with the best of them.
        work: the requests that each of them answers.
        repeats: how often.

    Returns:
        As `compete`, and the `ratios` of each time.
    """
    found = [compete(make_fixed(), make_auto(), work) for _ in range(repeats)]
    first = found[0]
    rates = {
        k: round(median(each["tokens_per_s"][k] for each in found), 1)
        for k in first["tokens_per_s"]
    }
    # Who left early was seen in another part of the time; the machine may have been faster then.
    left = {k for each in found for k in each["left_early"]}
    stayed = [k for k in rates if k not in {"auto", *left}] or [first["best_fixed"]]
    best = max(stayed, key=rates.__getitem__)
    return first | {
        "tokens_per_s": rates,
        "left_early": sorted(left),
        "best_fixed": best,
        "ratio": round(rates["auto"] / rates[best], 3),
        "ratios": [each["ratio"] for each in found],
        "identical": all(each["identical"] for each in found),
    }


def compete(fixed, auto, work):
    """Let all decode by turns; all must say the same.

    Args:
        fixed: contestants by name; those that are far behind leave early.
        auto: the contestant that is compared with the best of them.
        work: the requests that each of them answers.

    Returns:
        Of each its tokens per second and accept length, and the automatic one's tokens per second
        over those of the best fixed one: `ratio`.
    """
    left = {}
    while not auto.is_done:
        for contestant in (*fixed.values(), auto):
            if not contestant.is_done:
                contestant.turn()
        if len(auto.answers) >= len(work) // 5:
            best = max(each.rate for each in fixed.values())
            left |= {k: each for k, each in fixed.items() if each.rate < BEHIND * best}
            fixed = {k: each for k, each in fixed.items() if k not in left}
    for contestant in fixed.values():
        while not contestant.is_done:
            contestant.turn()
    best = max(fixed, key=lambda k: fixed[k].rate)
    everyone = {**left, **fixed, "auto": auto}
    said = [answer for each in everyone.values() for answer in each.answers.items()]
    return {
        "tokens_per_s": {k: round(each.rate, 1) for k, each in everyone.items()},
        "accept_length": {k: each.accept_length for k, each in everyone.items()},
        "left_early": sorted(left),
        "best_fixed": best,
        "ratio": round(auto.rate / fixed[best].rate, 3),
        "identical": all(auto.answers[index] == token_ids for index, token_ids in said),
    }
