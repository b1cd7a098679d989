"""The plan of a job in words."""

from small_jobs import SETUP

from dspark_batch.job.plan import plan_of


def test_a_plan_names_the_shape_class_in_words():
    steps = [[1, 1], [2, 8], [1, 8], [2, 1], [4, 8]]
    machine = {"shapes": {"steps": steps, "prefill": [[1, 1]]}}
    assert plan_of(SETUP | {"machine": machine}) == {
        "mode": "exact",
        "slots": 4,
        "draft_length": 7,
        "expected_tokens_per_s": 9.5,
        "why": "because",
        "shape_class": "rounds: 1 or 2 slots by 1 or 8 tokens, 4 slots by 8 tokens; "
        "prefill: 1 prompt by 1 token",
    }


def test_the_fast_mode_has_no_shape_class():
    assert plan_of(SETUP | {"mode": "fast"})["shape_class"] == "none: any pass may run"


def test_an_engine_that_does_not_plan_has_no_plan():
    assert plan_of(None) is None
