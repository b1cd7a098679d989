"""Which pass runs: the smallest of the class that holds the round."""

import pytest

from dspark_batch.engine.shapes import Shapes

CLASS = Shapes(
    steps=((2, 8), (4, 4), (4, 8), (16, 2)), prefill=((1, 16), (1, 64), (4, 16)), least_capacity=64
)


def test_without_a_class_any_pass_runs():
    free = Shapes()
    assert (free.slots_for(5, 3), free.width(5, 3), free.most_width) == (5, 3, 0)
    assert free.prefill_pass(3, 50) == (3, 50)
    assert free.prefill_pass(1, 9000) == (1, 256)
    assert free.prefill_pass(64, 9000) == (64, 32)


@pytest.mark.parametrize(
    ("slots", "widest", "padded"), [(1, 1, 2), (2, 8, 2), (3, 2, 4), (3, 5, 4), (5, 2, 16)]
)
def test_slots_are_padded_to_the_smallest_pass_that_holds_them(slots, widest, padded):
    assert CLASS.slots_for(slots, widest) == padded


def test_a_width_is_padded_within_the_slots():
    assert [CLASS.width(4, w) for w in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, None]
    assert CLASS.width(16, 3) is None


def test_what_no_pass_holds_is_refused():
    with pytest.raises(ValueError, match="--mode fast"):
        CLASS.slots_for(5, 3)


def test_a_prompt_takes_the_smallest_pass_or_the_widest_again_and_again():
    assert [CLASS.prefill_pass(1, n) for n in (1, 16, 17, 500)] == [
        (1, 16),
        (1, 16),
        (1, 64),
        (1, 64),
    ]
    assert CLASS.prefill_pass(3, 500) == (4, 16)
    assert CLASS.most_prompts == 4


def test_a_class_survives_json():
    import json

    assert Shapes.from_json(json.loads(json.dumps(CLASS.to_json()))) == CLASS
