"""No clock decides a byte: the same job under a true clock and under clocks that lie."""

import random
from functools import cache
from pathlib import Path

from golden_cases import load_case

import dspark_batch
from dspark_batch.engine.clock import Clock
from dspark_batch.engine.engine import Engine
from dspark_batch.tuning.pace import Pace
from dspark_batch.types import Item, Request, Sampling

CASE = "qwen3_vanilla"
SETTINGS = {"slots": 4, "lengths": tuple(range(8)), "costs": (1.0, 1 / 24, 0.3, 0.1)}
SEEDS = range(2)


class LyingTime:
    """Seconds of which each reading is scaled at random."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._now = 0.0

    def __call__(self):
        self._now += 10 ** self._random.uniform(-6, 3)
        return self._now * self._random.uniform(0.5, 2)  # it may go back, too


class StoppedTime:
    """Seconds that never pass."""

    def __call__(self):
        return 0.0


def requests(count=10):
    """Prompts of a recorded pair, half of them sampled, with answers of mixed lengths."""
    case = load_case(CASE)
    ids = [t for run in ("greedy0", "greedy1") for t in case[f"{run}.output_ids"].tolist()]
    found = []
    for index in range(count):
        sampling = Sampling(temperature=0.8 if index % 2 else 0.0, top_p=0.95, seed=3)
        item = Item(index, str(index), f"digest-{index}", f"test:{index}")
        prompt = tuple(ids[3 * index : 3 * index + 4 + index])
        found.append(Request(item, prompt, 10 + 7 * (index % 4), sampling))
    return found


def answered(now=None, **settings):
    """Answer all; give the bytes, and how rounds drafted."""
    engine = Engine(load_case(CASE).pair, **(SETTINGS | settings))
    if now is not None:
        engine._clock._now = now
    answers = list(engine.generate(requests()))
    bytes_of = {a.item.index: (a.token_ids, a.finish_reason) for a in answers}
    drafted = {a.item.index: a.num_drafted for a in answers}
    return bytes_of, drafted


@cache
def told_truth():
    return answered()[0]


def differences(**settings):
    """List the clocks under which some byte is another one."""
    truth = answered(**settings)[0]
    return [seed for seed in SEEDS if answered(LyingTime(seed), **settings)[0] != truth]


def test_clocks_that_lie_change_how_rounds_draft_and_no_byte():
    lied_to = [answered(LyingTime(seed)) for seed in SEEDS]
    assert [answers for answers, _ in lied_to] == [told_truth()] * len(SEEDS)
    assert len({str(drafted) for _, drafted in lied_to}) > 1  # they did believe it


def test_a_clock_that_stands_still_changes_no_byte():
    assert answered(StoppedTime())[0] == told_truth()


def test_neither_does_what_is_believed_at_the_start():
    for costs in ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (1e-9, 1e9, 1e9, 1e9)):
        assert answered(costs=costs)[0] == told_truth()


def test_the_bytes_are_those_of_plain_decoding_alone():
    plain = answered(slots=1, draft_length=0, lengths=(), prefix_positions=0)[0]
    assert plain == told_truth()


def test_under_the_rejection_rule_where_drafts_decide_no_clock_is_asked():
    assert differences(sampling="rejection") == []


def test_a_timing_in_a_bytes_way_is_seen(monkeypatch):
    """Planted: under the rejection rule, too, rounds draft what seems to pay."""
    init = Engine.__init__

    def paced(self, pair, **settings):
        init(self, pair, **settings)
        self._pace = Pace(self.costs, self._acceptance, settings["lengths"])

    monkeypatch.setattr(Engine, "__init__", paced)
    assert differences(sampling="rejection") != []


def test_so_is_a_choice_by_the_time_of_a_round(monkeypatch):
    """Planted: a slow round ends answers early."""
    end = Clock.end

    def ends(self):
        seconds = end(self)
        if seconds is not None and seconds > 1.0:
            for sequence in engines[-1]._slots.active:
                sequence.finish_reason = "length"
        return seconds

    engines, init = [], Engine.__init__

    def noted(self, pair, **settings):
        init(self, pair, **settings)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", noted)
    monkeypatch.setattr(Clock, "end", ends)
    assert answered(StoppedTime())[0] != answered(LyingTime(1))[0]


def test_seconds_that_decide_come_from_one_place():
    """Of what decodes, the engine's clock alone; a sequence only tells of its times."""
    package = Path(dspark_batch.__file__).parent
    reads = {
        file.relative_to(package).as_posix()
        for part in ("engine", "answers", "tuning", "models", "numerics")
        for file in (package / part).rglob("*.py")
        if "import time" in file.read_text() or "from time" in file.read_text()
    }
    assert reads == {"engine/clock.py", "answers/sequence.py"}
