"""What an item may choose for itself, and what is said when it may not."""

import pytest
from fakes import fake_render

from dspark_batch.job.mapping import to_request
from dspark_batch.job.spec import Spec
from dspark_batch.types import Item, Sampling


def ask(own=None, **options):
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", **options)
    record = {"prompt": "hi", "sampling_params": own}
    return to_request(Item(0, "0", "d", "in.jsonl:1", record), spec, fake_render, 100)


def complaint(own):
    failure = ask(own)
    assert failure.code == "bad_record"
    return failure.message.removeprefix("in.jsonl:1: ")


def test_an_item_without_choices_takes_the_jobs():
    request = ask(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=3, stop=("a",))
    assert request.sampling == Sampling(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=3, stop=("a",)
    )


def test_an_items_own_choices_go_first_and_the_rest_stays():
    own = {"temperature": 0, "seed": 9, "max_tokens": 4, "top_p": None}
    request = ask(own, temperature=0.7, top_p=0.9, max_tokens=20)
    assert request.sampling == Sampling(temperature=0, top_p=0.9, seed=9)
    assert request.max_tokens == 4
    assert ask({"max_tokens": 999}).max_tokens == 92  # the room in the context


@pytest.mark.parametrize(
    ("stop", "stops"), [("x", ("x",)), (["x", "y"], ("x", "y")), ([], ()), (None, ("job's",))]
)
def test_stop_is_one_string_or_a_list(stop, stops):
    assert ask({"stop": stop}, stop=("job's",)).sampling.stop == stops


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ("warm", "`sampling_params` is 'warm', expected an object."),
        (
            {"temprature": 1},
            "`sampling_params.temprature` is unknown; known are temperature, top_p, top_k, min_p, "
            "seed, max_tokens, stop.",
        ),
        ({"temperature": "1"}, "`sampling_params.temperature` is '1', expected a number."),
        ({"temperature": True}, "`sampling_params.temperature` is True, expected a number."),
        ({"top_k": 1.5}, "`sampling_params.top_k` is 1.5, expected a whole number."),
        ({"seed": [1]}, "`sampling_params.seed` is [1], expected a whole number."),
        (
            {"stop": ["a", 5]},
            "`sampling_params.stop` is ['a', 5], expected a string or a list of strings.",
        ),
        ({"max_tokens": 0}, "`sampling_params.max_tokens` is 0, expected 1 or more."),
        ({"temperature": -1}, "`sampling_params`: temperature is -1, expected 0 or more."),
        ({"top_p": 0}, "`sampling_params`: top_p is 0, expected more than 0, at most 1."),
        ({"stop": ""}, "`sampling_params`: stop is [''], expected strings that are not empty."),
    ],
)
def test_says_what_is_wrong_with_the_choices(own, sentence):
    assert complaint(own) == sentence
