"""The plan of a job in words."""

from small_jobs import SETUP

from dspark_batch.output.plan import plan_of


def test_a_plan_says_how_a_job_began_and_in_which_numbers():
    assert plan_of(SETUP) == {
        "slots": 4,
        "draft_length": 7,
        "why": "because",
        "dtype": "float32",
        "step_shape": "any",
    }


def test_a_target_of_one_shape_is_named_with_it():
    assert plan_of(SETUP | {"step_shape": [16, 8]})["step_shape"] == "16 slots by 8 tokens, always"
