"""The loop against the reference's recorded runs: ids, counts, stops and limits, exactly."""

import dataclasses
from functools import cache

import pytest
from golden_cases import CASES, GREEDY_RUNS, load_case

from dspark_batch.engine.engine import Engine
from dspark_batch.types import Item, Request

STOP_RUNS = ["stop_first", "stop_inside", "stop_last_accepted", "stop_bonus", "stop_only_rejected"]
LIMIT_RUNS = ["max1", "max_cut_inside", "max_exact"]
ALL_RUNS = GREEDY_RUNS + STOP_RUNS + LIMIT_RUNS
# All runs of a dense and of a hybrid pair, two of each other one; the rest with the slow tests.
OFTEN = {
    *((case, run) for case in ("qwen3_vanilla", "qwen35_dflash") for run in ALL_RUNS),
    *((case, GREEDY_RUNS[0]) for case in CASES),
    *((case, ALL_RUNS[1 + n % (len(ALL_RUNS) - 1)]) for n, case in enumerate(CASES)),
}
RUNS = [
    pytest.param(case, run, marks=() if (case, run) in OFTEN else pytest.mark.slow)
    for case in CASES
    for run in ALL_RUNS
    if run in load_case(case).runs
]
THRESHOLDS = [case for case in CASES if "threshold" in load_case(case).runs]


@cache
def decode(case, run, **settings):
    case = load_case(case)
    recorded, pair = case.runs[run], case.pair
    if stops := recorded.get("stop_token_ids"):
        config = dataclasses.replace(pair.config, stop_ids=frozenset(stops))
        pair = pair._replace(config=config)
    item = Item(0, "0", "digest", "test:1")
    request = Request(item, case.prompt(run), recorded["max_new_tokens"])
    (outcome,) = Engine(pair, **settings).generate([request])
    return outcome


def committed(accept_lengths, total):
    """The reference's accept lengths as this project counts them: only tokens that came out."""
    lengths, left = [], total - 1  # the first token comes from prefill
    for length in accept_lengths:
        if left == 0:
            break  # the reference's wasted last round
        lengths.append(min(length, left))
        left -= lengths[-1]
    return lengths


@pytest.mark.parametrize(("case", "run"), RUNS)
def test_ids_and_accept_lengths_are_the_references(case, run):
    completion = decode(case, run)
    recorded = load_case(case)[f"{run}.acceptance_lengths"].tolist()
    assert list(completion.token_ids) == load_case(case).answer(run)
    assert list(completion.accept_lengths) == committed(recorded, len(completion.token_ids))


@pytest.mark.parametrize("case", CASES)
def test_plain_decoding_in_three_slots_gives_the_references_plain_ids(case):
    case = load_case(case)
    recorded = {run: case[f"{run}.plain_greedy_ids"].tolist() for run in GREEDY_RUNS}
    requests = [
        Request(Item(index, run, "digest", f"test:{run}"), case.prompt(run), len(recorded[run]))
        for index, run in enumerate(GREEDY_RUNS)
    ]
    for plain in Engine(case.pair, slots=3, draft_length=0).generate(requests):
        assert list(plain.token_ids) == recorded[plain.item.custom_id]


@pytest.mark.parametrize("case", THRESHOLDS)
def test_the_confidence_threshold_cuts_the_blocks_that_the_reference_cuts(case):
    threshold = load_case(case).runs["threshold"]["confidence_threshold"]
    completion = decode(case, "threshold", confidence_threshold=threshold)
    rounds = len(completion.accept_lengths)
    proposed = load_case(case)["threshold.proposal_lengths"].tolist()
    accepted = load_case(case)["threshold.accepted_draft_lengths"].tolist()
    assert min(proposed) < max(proposed)
    assert list(completion.token_ids) == load_case(case).answer("threshold")
    assert list(completion.num_drafted) == proposed[:rounds]
    assert list(completion.num_accepted[:-1]) == accepted[: rounds - 1]


def test_a_neighbour_with_a_longer_block_lengthens_no_other():
    case = load_case("gemma4_vanilla")
    threshold = case.runs["threshold"]["confidence_threshold"]
    requests = [
        Request(Item(i, run, "digest", f"test:{run}"), case.prompt(run), 20)
        for i, run in enumerate(GREEDY_RUNS)
    ]

    def counts(slots):
        engine = Engine(case.pair, slots=slots, confidence_threshold=threshold)
        return {c.item.index: (c.num_drafted, c.num_accepted) for c in engine.generate(requests)}

    assert counts(slots=3) == counts(slots=1)


def test_some_blocks_are_cut_to_nothing():
    assert any(0 in load_case(case)["threshold.proposal_lengths"].tolist() for case in THRESHOLDS)


def test_every_recorded_run_is_compared():
    sampled = {"sampled_t1", "sampled_t07"}  # compared in test_sampled_answers
    known = {*GREEDY_RUNS, *STOP_RUNS, *LIMIT_RUNS, "threshold"}
    assert all(set(load_case(case).runs) - sampled <= known for case in CASES)
