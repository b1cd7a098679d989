"""What no setting of the loop may change; the recorded runs are in test_golden_runs."""

import dataclasses
from functools import cache

import pytest
from golden_cases import GREEDY_RUNS, load_case
from grids import grid

from dspark_batch.engine.engine import Engine
from dspark_batch.errors import UsageError
from dspark_batch.types import Failure, Item, Request

STOP_RUNS = ["stop_first", "stop_inside", "stop_last_accepted", "stop_bonus", "stop_only_rejected"]
LIMIT_RUNS = ["max1", "max_cut_inside", "max_exact"]


@pytest.fixture(scope="module")
def case():
    return load_case("qwen3_vanilla")


def item(index=0):
    return Item(index, str(index), f"digest-{index}", f"test:{index + 1}")


def with_stops(pair, stop_ids):
    if stop_ids is None:
        return pair
    config = dataclasses.replace(pair.config, stop_ids=frozenset(stop_ids))
    return pair._replace(config=config)


@cache
def decode(run, **settings):
    case = load_case("qwen3_vanilla")
    recorded = case.runs[run]
    pair = with_stops(case.pair, recorded.get("stop_token_ids"))
    request = Request(item(), case.prompt(run), recorded["max_new_tokens"])
    (outcome,) = Engine(pair, **settings).generate([request])
    return outcome


@pytest.mark.parametrize(
    ("draft_length", "run"), grid([1, 4], GREEDY_RUNS + STOP_RUNS + LIMIT_RUNS)
)  # 7 in test_golden_runs
def test_no_draft_length_changes_tokens_or_finish_reason(draft_length, run):
    plain = decode(run, draft_length=0)
    completion = decode(run, draft_length=draft_length)
    assert completion.token_ids == plain.token_ids
    assert completion.finish_reason == plain.finish_reason
    assert 1 + sum(completion.accept_lengths) == len(completion.token_ids)


@pytest.mark.parametrize("draft_length", [0, 7])
def test_every_limit_cuts_where_plain_decoding_would_stop(case, draft_length):
    stop = case.answer("greedy0")[20]
    pair = with_stops(case.pair, [stop])
    first_stop = case.answer("greedy0").index(stop) + 1
    requests = [Request(item(limit), case.prompt("greedy0"), limit) for limit in range(1, 26)]
    for completion in Engine(pair, slots=5, draft_length=draft_length).generate(requests):
        limit = completion.item.index
        expected = case.answer("greedy0")[: min(limit, first_stop)]
        assert list(completion.token_ids) == expected
        assert completion.finish_reason == ("stop" if limit >= first_stop else "length")


def six_requests():
    case = load_case("qwen3_vanilla")
    prompts = [case.prompt(run) for run in GREEDY_RUNS * 2]
    return [Request(item(i), ids[: 5 + 3 * i], 9 + 7 * (i % 3)) for i, ids in enumerate(prompts)]


@cache
def six_answers_alone():
    engine = Engine(load_case("qwen3_vanilla").pair, draft_length=0)
    return {c.item.index: c.token_ids for c in engine.generate(six_requests())}


@pytest.mark.parametrize(("slots", "draft_length"), [(1, 7), (2, 7), (3, 0), (5, 7)])
def test_neighbours_change_nothing(case, slots, draft_length):
    engine = Engine(case.pair, slots=slots, draft_length=draft_length)
    together = {c.item.index: c.token_ids for c in engine.generate(six_requests())}
    assert together == six_answers_alone()


def test_failures_pass_through_and_few_requests_are_pulled_ahead(case):
    pulled = []

    def stream():
        for index in range(40):
            pulled.append(index)
            if index == 1:
                yield Failure(item(1), "bad_record", "no prompt")
            else:
                yield Request(item(index), case.prompt("greedy0"), 3)

    outcomes = Engine(case.pair).generate(stream())
    assert next(outcomes).item.index == 1
    assert pulled == [0, 1]
    assert next(outcomes).item.index == 0
    assert len(pulled) < 20
    assert len(list(outcomes)) == 38


def test_once_no_item_may_begin_what_is_in_flight_is_finished_and_the_rest_is_left(case):
    asked = []

    def may_begin(asked_about):
        asked.append(asked_about.index)
        return len(asked) < 4

    requests = [Request(item(n), case.prompt("greedy0"), 20) for n in range(50)]
    outcomes = list(Engine(case.pair, slots=2).generate(requests, may_begin))
    assert len(asked) == 4
    assert {o.item.index for o in outcomes} == set(asked[:3])


def test_a_draft_longer_than_the_block_is_refused(case):
    with pytest.raises(UsageError, match="block has 7 positions"):
        Engine(case.pair, draft_length=8)


def test_the_gauge_says_how_full_the_engine_is_and_what_it_spent():
    case = load_case("qwen3_vanilla")
    engine = Engine(case.pair, slots=2)
    before = engine.gauge()
    assert (before.busy_slots, before.slots, before.prefill_s, before.round_s) == (0, 2, 0, 0)
    requests = [
        Request(item(n), case.prompt(GREEDY_RUNS[0]), tokens) for n, tokens in enumerate((2, 40))
    ]
    answers = engine.generate(requests)
    next(answers)
    during = engine.gauge()
    assert 1.5 <= during.busy_slots < 2  # both, until the round that runs now
    list(answers)
    after = engine.gauge()
    assert 1 < after.busy_slots < 1.5  # then the long one alone, for more rounds
    assert 0 <= during.round_s < after.round_s
    assert after.prefill_s == during.prefill_s > 0
    assert after.peak_memory_bytes >= after.memory_bytes > 0


def test_confidence_is_logged_where_rounds_draft_and_where_they_do_not(case):
    dear = (1.0, 0.0, 9.0, 9.0)  # a drafter's pass, so that rounds are plain
    request = Request(item(), case.prompt("greedy0"), 40)
    settings = {"lengths": (0, 7), "costs": dear, "log_confidence": True}
    (answer,) = Engine(case.pair, **settings).generate([request])
    assert list(answer.token_ids) == case.answer("greedy0")[:40]
    assert list(map(len, answer.confidence)) == list(answer.num_drafted)
    assert () in answer.confidence
