"""Add, step, cancel: what a server does with the engine."""

import dataclasses
from collections import deque
from functools import cache

import pytest
from golden_cases import load_case

from dspark_batch.engine import scheduler
from dspark_batch.engine.engine import Engine
from dspark_batch.errors import UsageError
from dspark_batch.types import Completion, Failure, Item, Request, Sampling

IDS = load_case("qwen3_vanilla")["greedy0.output_ids"].tolist()
BEGINNING = tuple(IDS[:24])  # three chunks of the prefix cache
MANY = 6
SETTINGS = [
    {"slots": 2},
    {"slots": 3, "prefix_positions": 0},
    {"slots": 3, "drafts_ahead": True},
    {"slots": 4, "draft_length": 0},
]
# Each of these gives items up at every round of a job: two run often.
OFTEN = [
    pytest.param(settings, marks=pytest.mark.slow if number % 2 else ())
    for number, settings in enumerate(SETTINGS)
]


@pytest.fixture
def one_pass_a_round(monkeypatch):
    """Let rounds go on behind every pass of a prompt."""
    monkeypatch.setattr(scheduler, "_PROMPT_TOKENS", 1)


def request(n, max_tokens=None):
    """Make one of some requests, half of which begin alike, and a third of which are drawn."""
    prompt = (*(BEGINNING if n % 2 else ()), *IDS[n : n + 5])
    sampling = Sampling(temperature=1.0 if n % 3 == 2 else 0.0)
    return Request(
        Item(n, f"#{n}", f"digest-{n}", f"test:{n}"),
        prompt,
        max_tokens or 3 + 3 * (n % 4),
        sampling,
    )


def engine_of(**settings):
    return Engine(load_case("qwen3_vanilla").pair, **settings)


@cache
def answer_to(n):
    """Answer a request alone, plainly."""
    (answer,) = engine_of(draft_length=0).generate([request(n)])
    return answer.token_ids


def run_out(engine):
    outcomes = []
    while not engine.is_idle:
        outcomes += engine.step()
    return outcomes


def where_items_are(engine):
    """List the items by state, as the engine's parts tell it."""
    parts = engine._scheduler
    waves = parts._through + parts._ready
    return {
        "waiting": [w.request.item for w in parts.window._waiting],
        "in prefill": [s.request.item for s in parts._begun],
        "ready": [s.request.item for wave in waves for _, s in wave.sequences],
        "decoding": [s.request.item for s in engine._slots.active],
    }


def watch_rounds(engine):
    """Note which items sit in the slots of each round."""
    rounds, launch = [], engine._launch

    def launched():
        rounds.append({s.request.item.index for s in engine._slots.active})
        return launch()

    engine._launch = launched
    return rounds


def check_answers(outcomes, cancelled=()):
    assert sorted(o.item.index for o in outcomes) == list(range(MANY))
    for outcome in outcomes:
        if outcome.item.index in cancelled:
            assert outcome.code == "cancelled"
            assert outcome.message.startswith(outcome.item.where)
        else:
            assert outcome.token_ids == answer_to(outcome.item.index)


@pytest.mark.parametrize("settings", OFTEN, ids=str)
@pytest.mark.usefixtures("one_pass_a_round")
def test_whoever_is_given_up_at_any_round_is_gone_in_the_next_and_others_change_no_token(settings):
    seen, at = set(), 0
    while True:
        engine = engine_of(**settings)
        rounds = watch_rounds(engine)
        for n in range(MANY):
            engine.add(request(n))
        outcomes = [o for _ in range(at) for o in engine.step()]
        if engine.is_idle:
            break
        states = {state: items for state, items in where_items_are(engine).items() if items}
        seen |= states.keys()
        given_up = [items[at % len(items)] for items in states.values()]
        for item in given_up:
            engine.cancel(item)
            assert engine.so_far(item) is None
        num_rounds = len(rounds)
        step = engine.step()
        cancelled = {item.index for item in given_up}
        assert cancelled <= {o.item.index for o in step}
        outcomes += step + run_out(engine)
        check_answers(outcomes, cancelled)
        assert not any(items & cancelled for items in rounds[num_rounds:])
        at += 1
    assert seen >= {"waiting", "decoding", "ready"}
    assert "in prefill" in seen or settings.get("prefix_positions") == 0


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_an_item_that_was_given_up_can_be_asked_again_of_the_same_engine(settings):
    engine = engine_of(**settings)
    for n in range(MANY):
        engine.add(request(n))
    ended = [o.item.index for _ in range(4) for o in engine.step()]
    for n in range(MANY):
        engine.cancel(request(n).item)
    given_up = [o.item.index for o in engine.step()]
    assert sorted(ended + given_up) == list(range(MANY))
    assert engine.is_idle
    check_answers(list(engine.generate(map(request, range(MANY)))))


def test_to_give_up_what_has_ended_or_never_came_changes_nothing():
    engine = engine_of(slots=2)
    engine.cancel(request(5).item)
    assert engine.is_idle
    assert engine.step() == []
    engine.add(request(0))
    (answer,) = run_out(engine)
    engine.cancel(answer.item)
    assert (engine.step(), engine.is_idle) == ([], True)


def test_requests_come_while_others_decode():
    engine, left = engine_of(slots=3), deque(map(request, range(MANY)))
    outcomes = []
    while left or not engine.is_idle:
        if left:
            engine.add(left.popleft())
        outcomes += engine.step()
    check_answers(outcomes)


def test_a_step_ends_as_many_rounds_as_it_begins_and_never_more_than_one():
    engine = engine_of(slots=3)
    rounds = watch_rounds(engine)
    for n in range(MANY):
        engine.add(request(n))
    steps = 0
    while not engine.is_idle:
        engine.step()
        steps += 1
        assert len(rounds) <= steps
    assert len(rounds) < steps  # the first one computes prompts


@pytest.mark.parametrize("slots", [1, 4])
def test_at_most_one_that_is_not_urgent_gets_a_slot_before_an_urgent_one(slots):
    engine = engine_of(slots=slots, draft_length=0)
    rounds = watch_rounds(engine)
    for n in range(9):
        engine.add(request(n, 6 + 3 * n))
    while len(rounds) < 3:
        engine.step()
    seated = set().union(*rounds)
    engine.add(request(9, 5), urgent=True)
    while 9 not in rounds[-1]:
        engine.step()
    assert len(set().union(*rounds) - seated - {9}) <= 1  # its prompt was computed when a slot came
    assert not engine._scheduler.window.has_urgent
    assert len(run_out(engine)) > 0


def test_what_is_committed_so_far_grows_into_the_answer():
    engine, asked = engine_of(slots=2), request(3)
    engine.add(asked)
    engine.add(request(1))
    assert engine.so_far(asked.item) is None
    seen = [()]
    while not engine.is_idle:
        answers = [o for o in engine.step() if o.item == asked.item]
        partial = engine.so_far(asked.item)
        if partial:
            assert partial.token_ids[: len(seen[-1])] == seen[-1]
            assert len(partial.is_drafted) == len(partial.token_ids)
            seen.append(partial.token_ids)
            drafted = partial.is_drafted
        if answers:
            (answer,) = answers
    assert len(seen) > 2
    assert answer.token_ids[: len(seen[-1])] == seen[-1]
    assert answer.is_drafted[: len(drafted)] == drafted
    assert sum(answer.is_drafted) == sum(answer.num_accepted)
    assert len(answer.is_drafted) == len(answer.token_ids)
    assert engine.so_far(asked.item) is None


def test_after_a_no_what_waits_is_dropped_and_what_decodes_is_finished():
    engine, asked = engine_of(slots=2), []

    def may_begin(item):
        asked.append(item.index)
        return len(asked) < 4

    for n in range(MANY):
        engine.add(request(n))
    outcomes = []
    while not engine.is_idle:
        outcomes += engine.step(may_begin)
    assert {o.item.index for o in outcomes} == set(asked[:3])
    assert all(isinstance(o, Completion) for o in outcomes)


def test_stop_strings_without_a_tokenizer_are_refused_before_they_wait():
    engine = engine_of()
    stops = dataclasses.replace(request(0), sampling=Sampling(stop=("x",)))
    with pytest.raises(UsageError, match="stop strings"):
        engine.add(stops)
    assert engine.is_idle


def test_generate_gives_outcomes_in_the_order_of_the_steps():
    stepped = engine_of(slots=3)
    for n in range(MANY):
        stepped.add(request(n))
    by_steps = [o.item.index for o in run_out(stepped)]
    failure = Failure(Item(99, "x", "d", "test:99"), "bad_record", "no prompt")
    outcomes = list(engine_of(slots=3).generate([failure, *map(request, range(MANY))]))
    assert [o.item.index for o in outcomes] == [99, *by_steps]
