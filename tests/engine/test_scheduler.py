"""Prompts are computed ahead of need, in waves, and never too many of them."""

import pytest
from golden_cases import load_case

from dspark_batch import device
from dspark_batch.caches.slot_cache import whole_steps
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.shapes import Shapes
from dspark_batch.types import Item, Request

IDS = [
    t
    for run in ("greedy0", "greedy1")
    for t in load_case("qwen3_vanilla")[f"{run}.output_ids"].tolist()
]


def requests(count, max_tokens):
    return [
        Request(
            Item(n, str(n), f"digest-{n}", f"test:{n}"), tuple(IDS[n % 60 : n % 60 + 5]), max_tokens
        )
        for n in range(count)
    ]


class Flights:
    """Counts the items of an engine that have begun and not ended."""

    def __init__(self, engine):
        self.now = self.most = 0
        self._goes_on, engine._goes_on = engine._goes_on, self.goes_on

    def begin(self, item):
        self.now += 1
        self.most = max(self.most, self.now)
        return True

    def goes_on(self, sequence, failure):
        goes_on = self._goes_on(sequence, failure)
        self.now -= not goes_on
        return goes_on


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (2, 3), (3, 4), (8, 12)])
def test_half_as_many_as_there_are_slots_wait_with_their_prompts_computed(slots, most):
    engine = Engine(load_case("qwen3_vanilla").pair, slots=slots)
    flights = Flights(engine)
    assert len(list(engine.generate(requests(20, 7), flights.begin))) == 20
    assert flights.most == most


def test_an_answer_of_one_token_takes_no_slot():
    engine = Engine(load_case("qwen3_vanilla").pair, slots=2)
    whole = {a.item.index: a.token_ids for a in engine.generate(requests(9, 4))}
    rounds = engine.gauge().busy_slots
    engine = Engine(load_case("qwen3_vanilla").pair, slots=2)
    short = list(engine.generate(requests(9, 1)))
    assert {a.item.index: a.token_ids for a in short} == {n: ids[:1] for n, ids in whole.items()}
    assert {(a.finish_reason, a.accept_lengths, a.decode_s) for a in short} == {("length", (), 0.0)}
    assert rounds > 0 == engine.gauge().busy_slots


def test_prompts_that_wait_count_as_positions():
    pair, most = load_case("qwen3_vanilla").pair, []
    room = 4 * (5 + 9 + 2)  # four slots with prompt, answer, a round, and one not read yet
    for limit in (room, room + 5, room + 10):
        engine = Engine(pair, slots=4, draft_length=0, most_positions=limit)
        flights = Flights(engine)
        assert len(list(engine.generate(requests(20, 9), flights.begin))) == 20
        most.append(flights.most)
    assert most == [3, 5, 6]  # a prompt is there twice until it has a slot


def test_waves_are_large(monkeypatch):
    engine, waves = Engine(load_case("qwen3_vanilla").pair, slots=8), []
    run = engine._passes.run_to
    monkeypatch.setattr(
        engine._passes, "run_to", lambda c, t, at: waves.append(len(t)) or run(c, t, at)
    )
    answers = list(engine.generate(requests(44, 6)))
    assert len(answers) == 44
    assert min(waves[:-1]) >= 2
    assert waves[0] == min(12, Shapes().most_prompts)  # all slots, and who waits


def test_no_slot_stays_free_for_long_while_somebody_is_ready(monkeypatch):
    engine, unused, wasted = Engine(load_case("qwen3_vanilla").pair, slots=64), 0, []
    launch = engine._launch

    def launched():
        nonlocal unused
        ready = sum(len(wave.sequences) for wave in engine._scheduler._ready)
        free = min(ready, 64 - len(engine._slots.active))
        unused = unused + free if free else 0
        wasted.append(unused)
        return launch()

    monkeypatch.setattr(engine, "_launch", launched)
    assert len(list(engine.generate(requests(192, 24)))) == 192
    assert 0 < max(wasted) < 64 // 16


def test_waves_that_sit_down_together_get_their_room_at_once(monkeypatch):
    """Short prompts come first here, so the room for the long ones behind them is made, too."""
    engine, sizes = Engine(load_case("qwen3_vanilla").pair, slots=24), []
    resize = engine._slots._resize

    def resized(slots, room):
        sizes.append((slots, whole_steps(room)))
        resize(slots, room)

    monkeypatch.setattr(engine._slots, "_resize", resized)
    for n, length in enumerate([5] * 20 + [125] * 16):
        item = Item(n, str(n), f"digest-{n}", f"test:{n}")
        engine.add(Request(item, tuple((IDS * 9)[n : n + length]), 40), urgent=length == 5)
    while len(engine._slots.active) < 24:
        engine.step()
    assert sizes == [(Shapes().slots_for(24), whole_steps(125 + 8))]


@pytest.mark.skipif(not device.is_cpu(), reason="tokens that a GPU pads cost little")
def test_a_long_prompt_goes_alone_where_padding_costs(monkeypatch):
    """The answers are those of any other passes."""
    long = Request(Item(99, "99", "digest-99", "test:99"), tuple(IDS[:60] * 2), 6)
    pair, passes = load_case("qwen3_vanilla").pair, []
    alone = [next(Engine(pair).generate([each])).token_ids for each in [long, *requests(3, 6)]]
    engine = Engine(pair, slots=8)
    run = engine._passes.run_to
    monkeypatch.setattr(
        engine._passes, "run_to", lambda c, t, at: passes.append(t.shape) or run(c, t, at)
    )
    for each in [*requests(3, 6), long]:
        engine.add(each)
    answers = []
    while not engine.is_idle:
        answers += engine.step()
    assert passes == [(1, 120), (3, 5)]
    by_index = {answer.item.index: answer.token_ids for answer in answers}
    assert [by_index[n] for n in (99, 0, 1, 2)] == alone
