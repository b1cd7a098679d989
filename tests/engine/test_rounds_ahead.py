"""The next round is on the device before the host reads one: no byte changes."""

from dataclasses import replace

import pytest
from golden_cases import load_case
from grids import grid
from test_drafts_ahead import answers, equally_long, ids, plainly, work

from dspark_batch.engine import engine as engine_module
from dspark_batch.engine.engine import Engine
from dspark_batch.types import Failure, Sampling


def engine_that(*, ahead=True, **settings):
    return Engine(load_case("qwen3_vanilla").pair, rounds_ahead=ahead, **settings)


def in_flight(engine, monkeypatch):
    """Collect how many rounds the device has whenever the host waits for one."""
    wait, found = engine._wait, []
    monkeypatch.setattr(
        engine, "_wait", lambda sent: found.append(1 + len(engine._running)) or wait(sent)
    )
    return found


@pytest.mark.parametrize(
    ("temperature", "shape"), grid([0.0, 1.0], [(2, 3), (4, 7), (7, 0), (16, 7), (3, None)])
)
def test_answers_are_those_of_plain_decoding(temperature, shape):
    slots, draft_length = shape
    settings = {"draft_length": draft_length}
    if draft_length is None:
        settings = {"lengths": (0, 1, 3, 7), "costs": (1.0, 0.01, 0.2, 0.01)}
    assert ids(engine_that(slots=slots, **settings), work(temperature)) == plainly(temperature)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_statistics_are_those_of_rounds_that_are_read_first(rule):
    late, ahead = (
        {
            n: (answer.token_ids, answer.num_accepted, answer.accept_lengths)
            for n, answer in answers(engine, work(1.0)).items()
        }
        for is_ahead in (False, True)
        for engine in [engine_that(ahead=is_ahead, slots=4, sampling=rule)]
    )
    assert ahead == late


@pytest.mark.parametrize("draft_length", [0, 3])
def test_the_device_has_a_round_behind_each_one_that_the_host_waits_for(draft_length, monkeypatch):
    engine = engine_that(slots=2, draft_length=draft_length)
    found = in_flight(engine, monkeypatch)
    list(engine.generate(equally_long(2, 60)))
    assert set(found) == {1, 2}
    # Not behind samples of what the parts take, nor where buffers grow, nor at the end.
    assert found.count(1) <= 7


def entries(engine, monkeypatch):
    """Collect how many rounds the device has when others enter."""
    enter, found = engine._slots.enter, []

    def enters(*arguments):
        found.append(len(engine._running))
        enter(*arguments)

    monkeypatch.setattr(engine._slots, "enter", enters)
    return found


@pytest.mark.parametrize("draft_length", [0, 3])
def test_others_sit_down_behind_a_round_that_the_device_has(draft_length, monkeypatch):
    engine = engine_that(slots=3, draft_length=draft_length)
    found = entries(engine, monkeypatch)
    requests = [replace(r, max_tokens=40 + 9 * n) for n, r in enumerate(equally_long(9, 40))]
    assert ids(engine, requests) == ids(engine_that(ahead=False, slots=3), requests)
    assert found[0] == 0
    assert found.count(1) >= 4, found


SYSTEM = tuple(range(1, 100))
SHORT = [(5, 7), (9, 11, 3), (8,), (2, 4)]
ALIKE = [(*SYSTEM, n) for n in range(5)]


@pytest.mark.parametrize(
    ("slots", "there", "newcomer", "running"),
    [
        (3, SHORT[:3], (6, 1), 1),
        (3, SHORT[:3], tuple(range(1, 200)), 0),  # buffers grow
        (4, SHORT[:3], (6, 1), 0),  # there are more slots
        (5, ALIKE, (*SYSTEM, 7), 1),
        (5, ALIKE, (6, 1), 0),  # nothing is shared any more
    ],
)
def test_who_would_move_others_waits_for_the_round(slots, there, newcomer, running, monkeypatch):
    engine = engine_that(slots=slots, draft_length=1)
    first, *others = equally_long(1 + len(there), 50)
    requests = [replace(r, prompt_ids=p) for r, p in zip(others, there, strict=True)]
    if slots == len(there):
        requests[0] = replace(requests[0], max_tokens=20)
    requests.append(replace(first, prompt_ids=newcomer))
    found = entries(engine, monkeypatch)
    for request in requests[:-1]:
        engine.add(request)
    outcomes = [outcome for _ in range(4) for outcome in engine.step()]
    engine.add(requests[-1])
    while not engine.is_idle:
        outcomes += engine.step()
    assert found == [0, running]
    expected = ids(engine_that(ahead=False), requests)
    assert {each.item.index: each.token_ids for each in outcomes} == expected


def test_waves_that_move_nothing_together_may_do_so_one_by_one(monkeypatch):
    monkeypatch.setattr(engine_module, "_LEAST_ROUNDS", 0)
    engine, moved = engine_that(slots=5, draft_length=0), []
    share, cache = engine._slots.cache.share, engine._slots.cache

    def shares(positions, owner):
        if positions != cache.shared:
            moved.append(len(engine._running))
        share(positions, owner)

    monkeypatch.setattr(cache, "share", shares)
    prompts = [*ALIKE[:3], *SHORT[:2], (*SYSTEM, 9), SHORT[3]]
    lengths = [90, 90, 90, 20, 20, 40, 40]
    requests = [
        replace(request, prompt_ids=prompt, max_tokens=length)
        for request, prompt, length in zip(equally_long(7, 1), prompts, lengths, strict=True)
    ]
    for request in requests[:5]:
        engine.add(request)
    outcomes = [outcome for _ in range(4) for outcome in engine.step()]
    engine.add(requests[5], urgent=True)
    engine.add(requests[6])
    while not engine.is_idle:
        outcomes += engine.step()
    assert len(moved) == 2  # to what the first wave shares, and back
    assert set(moved) == {0}
    expected = ids(engine_that(ahead=False), requests)
    assert {each.item.index: each.token_ids for each in outcomes} == expected


@pytest.mark.parametrize("draft_length", [0, 1])
@pytest.mark.parametrize("given_up", [1, 3])
def test_who_sits_down_behind_a_round_has_slots_made_for_nobody_else(
    draft_length, given_up, monkeypatch
):
    """A seat is free for the urgent one, and none for the two that wait behind it."""
    monkeypatch.setattr(engine_module, "_LEAST_ROUNDS", 0)
    engine, moved = engine_that(slots=16, draft_length=draft_length), []
    resize = engine._slots._resize

    def resized(slots, room):
        moved.append(len(engine._running))
        resize(slots, room)

    monkeypatch.setattr(engine._slots, "_resize", resized)
    prompts = [*SHORT, (6, 1), (7, 7), (3, 3, 3), (4, 4), (6, 6, 1), (7, 2), (1, 3, 3)]
    pairs = zip(equally_long(11, 60), prompts, strict=True)
    requests = [replace(request, prompt_ids=prompt) for request, prompt in pairs]
    for request in requests[:8]:
        engine.add(request)
    outcomes = [outcome for _ in range(8) for outcome in engine.step()]
    engine.cancel(requests[given_up].item)
    while len(engine._slots.active) != 7:
        outcomes += engine.step()
    engine.add(requests[8], urgent=True)
    engine.add(requests[9])
    engine.add(requests[10])
    while not engine.is_idle:
        outcomes += engine.step()
    assert set(moved) == {0}
    del requests[given_up]
    found = {each.item.index: each.token_ids for each in outcomes if not isinstance(each, Failure)}
    assert found == ids(engine_that(ahead=False), requests)


@pytest.mark.parametrize(("longest", "most"), [(36, 2), (3, 1)])
def test_short_answers_have_no_round_for_nothing_while_others_wait(longest, most, monkeypatch):
    engine = engine_that(slots=2, draft_length=0)
    waiting, launch = [], engine._launch

    def launched():
        if engine._running and engine._scheduler.num_waiting and engine._clock.answers:
            waiting.append(1 + len(engine._running))
        launch()

    monkeypatch.setattr(engine, "_launch", launched)
    list(engine.generate(equally_long(7, longest)))
    assert max(waiting, default=1) == most


def test_who_is_given_up_leaves_the_others_as_they_are(monkeypatch):
    engine, requests = engine_that(slots=3, draft_length=3), equally_long(3, 40)
    found = in_flight(engine, monkeypatch)
    for request in requests:
        engine.add(request)
    outcomes = [outcome for _ in range(5) for outcome in engine.step()]
    assert found[-1] == 2
    engine.cancel(requests[1].item)
    while not engine.is_idle:
        outcomes += engine.step()
    (given_up,) = [each for each in outcomes if isinstance(each, Failure)]
    assert (given_up.item, given_up.code) == (requests[1].item, "cancelled")
    alone = ids(engine_that(ahead=False), [requests[0], requests[2]])
    assert {e.item.index: e.token_ids for e in outcomes if e is not given_up} == alone


def test_every_pass_has_the_room_that_it_needs(monkeypatch):
    engine = engine_that(slots=3, draft_length=3)
    verify, rooms = engine._passes.verify, []

    def verified(cache, tokens, *others):
        rooms.append(cache.capacity - cache.lengths.max().item() - tokens.shape[1])
        return verify(cache, tokens, *others)

    monkeypatch.setattr(engine._passes, "verify", verified)
    list(engine.generate(equally_long(4, 150)))
    assert 0 <= min(rooms) < 8  # it was tight somewhere


def test_buffers_move_only_while_the_device_has_no_round(monkeypatch):
    engine, moved = engine_that(slots=3, draft_length=3), []
    for buffers in (engine._slots.cache, engine._slots.context):

        def told(*arguments, resize=buffers._resize):
            moved.append(len(engine._running))
            resize(*arguments)

        monkeypatch.setattr(buffers, "_resize", told)
    list(engine.generate(equally_long(4, 150)))
    assert len(moved) > 4
    assert set(moved) == {0}  # else both would be in memory


@pytest.mark.parametrize(
    "sampling",
    [{"repetition_penalty": 1.2}, {"logit_bias": ((7, 1.0),)}, {"min_tokens": 9}],
)
def test_whoever_looks_at_what_came_waits_for_it(sampling, monkeypatch):
    requests = [replace(r, sampling=Sampling(**sampling)) for r in equally_long(3, 20)]
    engine = engine_that(slots=3)
    found = in_flight(engine, monkeypatch)
    assert ids(engine, requests) == ids(engine_that(ahead=False), requests)
    assert set(found) == {1}


def test_on_a_cpu_rounds_are_read_first():
    assert not Engine(load_case("qwen3_vanilla").pair)._rounds_ahead
