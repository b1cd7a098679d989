"""The numbers behind the pictures are those that a person counts by hand."""

import math

import pytest

from dspark_batch.output.measures import Measures
from dspark_batch.record.rows import row_of
from dspark_batch.types import Completion, Failure, Item

ITEM = Item(0, "0", "d", "in.jsonl:1")


def row(*rounds, confidence=None, drafted=4, tokens=None):
    """A row whose rounds accepted so many drafts each."""
    count = 1 + sum(n + 1 for n in rounds) if tokens is None else tokens
    return row_of(
        Completion(
            ITEM,
            text="",
            token_ids=(1,) * count,
            finish_reason="stop",
            prompt_tokens=5,
            accept_lengths=tuple(n + 1 for n in rounds),
            num_accepted=rounds,
            num_drafted=(drafted,) * len(rounds),
            confidence=confidence,
            cached_tokens=3,
        )
    )


def measures_of(*rows, finished_at=None, group=None):
    measures = Measures()
    for one in rows:
        measures.add(one, finished_at, group)
    return measures


def test_a_draft_behind_a_refused_one_was_never_judged():
    measures = measures_of(row(2, 0, 4, 1))
    # 2: positions 1 and 2 stay, 3 is refused. 0: 1 is refused. 4: all stay. 1 ends the answer.
    assert [measures.reached[k] for k in range(4)] == [3, 2, 2, 1]
    assert [measures.accepted[k] for k in range(4)] == [2, 2, 1, 1]


def test_the_last_round_judges_nothing_because_a_limit_may_have_cut_it():
    measures = measures_of(row(3))
    assert not measures.reached
    assert measures.accepted_per_round == {3: 1}  # what it committed, it did commit


def test_confidences_are_compared_with_what_became_of_their_drafts():
    logits = ((2.0, 2.0, -2.0, 9.0), (-2.0, 9.0, 9.0, 9.0), (9.0, 9.0, 9.0, 9.0))
    measures = measures_of(row(2, 0, 4, confidence=logits))
    probability = 1 / (1 + math.exp(-2))
    sure, unsure = measures.confidence_bins[8], measures.confidence_bins[1]
    assert (sure.drafts, sure.accepted) == (2, 2)
    assert (unsure.drafts, unsure.accepted) == (2, 0)
    assert sure.confidence == pytest.approx(2 * probability)
    assert sum(each.drafts for each in measures.confidence_bins) == 4  # the 9s were not judged


def test_a_failure_is_no_length_and_no_speed():
    measures = measures_of(row_of(Failure(ITEM, "engine", "why")), finished_at=5.0, group="a")
    assert not measures.prompt_lengths
    assert not measures.finished_at
    assert not measures.groups


def test_items_are_grouped_by_the_value_of_a_column():
    measures = Measures()
    measures.add(row(3, 3), None, "easy")
    measures.add(row(0, 0, 0), None, "hard")
    measures.add(row(1), None, "hard")
    lengths = {name: (its.answers, its.accept_length) for name, its in measures.groups.items()}
    assert lengths == {"easy": (1, 4.0), "hard": (2, 5 / 4)}


def test_the_pace_leaves_out_the_pauses_between_starts():
    measures = Measures()
    for second in range(1, 17):  # 10 tokens a second, then a night, then 20
        measures.add(row(tokens=10), 1000.0 + second, None)
        measures.add(row(tokens=20), 9000.0 + second, None)
    pace = measures.pace([1000.0, 9000.0])
    assert pace.worked_s == 32
    assert pace.resumed_at_s == [16.0]
    assert pace.mean_tokens_per_s == 15
    assert pace.tokens_per_s[0] < pace.tokens_per_s[-1]


def test_a_start_that_finished_nothing_is_no_resume():
    measures = measures_of(row(tokens=10), finished_at=1004.0)
    pace = measures.pace([900.0, 1000.0])
    assert (pace.worked_s, pace.resumed_at_s) == (4, [])


def test_a_job_that_nobody_timed_has_no_pace():
    assert measures_of(row(1)).pace([1000.0]) is None
    assert measures_of(row(1), finished_at=1.0).pace([]) is None
