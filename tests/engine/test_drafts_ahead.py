"""The next drafts are on the device before the host reads a round: no byte changes."""

import random
from dataclasses import replace
from functools import cache

import pytest
from golden_cases import load_case
from grids import grid

from dspark_batch.caches.positions import PositionCache
from dspark_batch.engine import clock as clock_module
from dspark_batch.engine.engine import Engine
from dspark_batch.types import Item, Request, Sampling


def work(temperature, count=14, longest=25):
    """List items of mixed lengths, one in three of them greedy."""
    case, rng = load_case("qwen3_vanilla"), random.Random(3)
    ids = [t for run in ("greedy0", "greedy1") for t in case[f"{run}.output_ids"].tolist()]
    return [
        Request(
            Item(n, str(n), f"digest-{n}", f"test:{n}"),
            tuple(ids[start : start + rng.randint(1, 20)]),
            rng.randint(1, longest),
            Sampling(temperature=temperature if n % 3 else 0.0),
        )
        for n in range(count)
        for start in [rng.randrange(len(ids) - 25)]
    ]


def equally_long(count, max_tokens):
    return [replace(request, max_tokens=max_tokens) for request in work(0.0, count)]


def engine_that(*, ahead, **settings):
    return Engine(load_case("qwen3_vanilla").pair, drafts_ahead=ahead, **settings)


def answers(engine, requests):
    return {answer.item.index: answer for answer in engine.generate(requests)}


def ids(engine, requests):
    return {n: answer.token_ids for n, answer in answers(engine, requests).items()}


@cache
def plainly(temperature):
    return ids(engine_that(ahead=False, slots=7, draft_length=0), work(temperature))


def proposals(engine, monkeypatch):
    """Collect what tells of each pass of the drafter: the room behind what the context holds."""
    propose, rooms = engine._passes.propose, []

    def told(context, *others):
        rooms.append(context.capacity - context.lengths.max().item())
        return propose(context, *others)

    monkeypatch.setattr(engine._passes, "propose", told)
    return rooms


@pytest.mark.parametrize(
    ("temperature", "shape"), grid([0.0, 1.0], [(2, 3), (4, 7), (7, 0), (16, 7)])
)
def test_answers_are_those_of_plain_decoding(temperature, shape):
    settings = dict(zip(("slots", "draft_length"), shape, strict=True))
    assert ids(engine_that(ahead=True, **settings), work(temperature)) == plainly(temperature)


@pytest.mark.parametrize(
    ("temperature", "rule"), [(0.0, "coupled"), (1.0, "coupled"), (1.0, "rejection")]
)
def test_each_draft_is_worth_what_it_is_when_the_host_reads_first(temperature, rule):
    late, ahead = (
        {
            n: (answer.token_ids, answer.num_accepted)
            for n, answer in answers(engine, work(temperature)).items()
        }
        for is_ahead in (False, True)
        for engine in [engine_that(ahead=is_ahead, slots=4, sampling=rule)]
    )
    assert ahead == late  # drafts for others, or at other positions, would be accepted less often


def test_while_the_same_sit_in_the_slots_nothing_is_drafted_twice(monkeypatch):
    engine = engine_that(ahead=True, slots=2)
    passes = proposals(engine, monkeypatch)
    draft_now, late = engine._draft_now, []
    monkeypatch.setattr(engine, "_draft_now", lambda: late.append(None) or draft_now())
    list(engine.generate(equally_long(2, 40)))
    rounds = engine._clock.rounds
    assert rounds > 5
    assert len(late) <= 2  # the first, and one when a sequence ended
    assert len(passes) <= rounds + 2  # one behind the last round, one when a sequence ended


@pytest.mark.parametrize("draft_length", [0, 7])
def test_short_texts_do_not_move_in_the_cache(draft_length):
    engine = engine_that(ahead=True, slots=1, draft_length=draft_length)
    list(engine.generate(equally_long(1, 30)))
    assert engine._slots.changes == 2  # a slot was made, and somebody sat down


def test_the_context_has_room_for_a_round_that_nobody_has_read(monkeypatch):
    engine = engine_that(ahead=True, slots=3)
    rooms = proposals(engine, monkeypatch)
    list(engine.generate(equally_long(6, 150)))
    assert min(rooms) >= load_case("qwen3_vanilla").pair.drafter.block_size
    assert min(rooms) < 16  # it was tight somewhere


def test_the_room_that_admission_counts_is_all_that_is_asked_for(monkeypatch):
    engine = engine_that(ahead=True, slots=1)
    reserve, asked = engine._slots.context.reserve, []
    monkeypatch.setattr(
        engine._slots.context, "reserve", lambda room: asked.append(room) or reserve(room)
    )
    (request,) = equally_long(1, 60)
    list(engine.generate([request]))
    end = len(request.prompt_ids) + request.max_tokens
    assert end + 7 <= max(asked) <= engine._slots.num_positions([request], 1)


def test_a_fault_that_does_not_stay_costs_no_item_its_drafts(monkeypatch):
    engine = engine_that(ahead=True, slots=2)
    propose, calls = engine._passes.propose, []

    def fails_once(*arguments):
        calls.append(None)
        if len(calls) == 2:  # the first one made ahead
            raise ValueError("for a moment")
        return propose(*arguments)

    monkeypatch.setattr(engine._passes, "propose", fails_once)
    found = answers(engine, work(0.0))
    assert len(calls) > 2
    assert {answer.fallback for answer in found.values()} == {None}


def test_samples_time_every_part_of_their_own_round(monkeypatch):
    monkeypatch.setattr(clock_module, "_FIRST_SAMPLE", 2)
    monkeypatch.setattr(clock_module, "_SAMPLE_EVERY", 2)
    seconds = [0.0]
    engine = engine_that(ahead=True, slots=2)
    engine._clock = clock_module.Clock(lambda: seconds[0])
    for name, takes in (("propose", 3.0), ("verify", 5.0)):
        part = getattr(engine._passes, name)

        def slow(*arguments, part=part, takes=takes):
            seconds[0] += takes
            return part(*arguments)

        monkeypatch.setattr(engine._passes, name, slow)
    list(engine.generate(equally_long(2, 60)))
    gauge = engine.gauge()
    assert gauge.sampled_rounds > 2
    assert gauge.sampled_draft_s == 3.0 * gauge.sampled_rounds
    assert gauge.sampled_verify_s == 5.0 * gauge.sampled_rounds


@pytest.mark.parametrize("name", ["qwen3_vanilla", "qwen3_dflash", "qwen35_dflash"])
@pytest.mark.parametrize(
    "settings", [{"draft_length": 1}, {"draft_length": 3}, {"drafts_ahead": True}]
)
def test_no_pass_writes_behind_its_room(name, settings, monkeypatch):
    """The library would write there, into what belongs to others."""
    behind = []
    write = PositionCache.update_and_fetch

    def watched(cache, keys, values):
        last = cache.lengths.max().item() + keys.shape[2]
        behind.extend([last] if last > cache._extent.capacity else [])
        return write(cache, keys, values)

    monkeypatch.setattr(PositionCache, "update_and_fetch", watched)
    pair = load_case(name).pair
    pair = pair._replace(config=replace(pair.config, stop_ids=frozenset()))
    some = [  # that cross the end of a block of positions
        Request(Item(n, str(n), f"digest-{n}", f"test:{n}"), (5,) * (20 + n), 16) for n in range(2)
    ]
    done = list(Engine(pair, slots=2, **settings).generate(some))
    assert [len(each.token_ids) for each in done] == [16, 16]
    assert behind == []
