"""What an item may choose for itself, and what is said when it may not."""

import pytest
from fakes import fake_render

from dspark_batch.intake.mapping import to_request
from dspark_batch.spec.spec import Spec
from dspark_batch.spec.structure import structure_of
from dspark_batch.types import Item, Sampling

EOS, MORE = {"ignore_eos": True}, {"presence_penalty": 2}


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
            "`sampling_params.temprature` is not supported; did you mean temperature. Take it "
            "out, or leave it aside with --ignore-fields temprature.",
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


@pytest.mark.parametrize(
    ("own", "sampling", "max_tokens"),
    [
        ({"max_tokens": 4.0}, {}, 4),
        ({"max_new_tokens": 4}, {}, 4),
        ({"max_completion_tokens": 4, "max_tokens": 4.0}, {}, 4),
        ('{"max_tokens": 4}', {}, 4),
        ({"top_k": -1}, {}, 9),
        ({"top_k": -1.0}, {}, 9),
        ({"top_k": 20.0, "temperature": 0.7}, {"top_k": 20, "temperature": 0.7}, 9),
        ({"top_k": 10**30}, {"top_k": 2**31 - 1}, 9),
        ({"seed": 1.0}, {"seed": 1}, 9),
        ({"random_seed": 10**30}, {"seed": 10**30}, 9),
        ({"stop_token_ids": [1, 2.0]}, {"stop_ids": frozenset({1, 2})}, 9),
        ({"repetition_penalty": 1.0, "n": 1.0, "ignore_eos": False, "min_tokens": 0}, {}, 9),
        ({"repetition_penalty": 1.1, "ignore_eos": True}, {"repetition_penalty": 1.1} | EOS, 9),
        ({"frequency_penalty": -2, "presence_penalty": 2}, {"frequency_penalty": -2} | MORE, 9),
        (
            {"logit_bias": {"7": 1.5, "3": -100, "9": None}, "bad_words": "x"},
            {"logit_bias": ((3, -100), (7, 1.5)), "bad_words": ("x",)},
            9,
        ),
        ({"logit_bias": {}, "bad_words": [], "min_tokens": 9.0}, {"min_tokens": 9}, 9),
        ({"skip_special_tokens": True, "logprobs": None, "top_logprobs": 0}, {}, 9),
        ({"logprobs": False, "top_logprobs": 0}, {}, 9),
        ({"logprobs": True}, {"logprobs": 0}, 9),
        ({"logprobs": 3.0}, {"logprobs": 3}, 9),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}, 9),
        ({}, {}, 9),
    ],
)
def test_words_and_numbers_of_others_are_obeyed(own, sampling, max_tokens):
    request = ask(own, max_tokens=9)
    assert (request.sampling, request.max_tokens) == (Sampling(**sampling), max_tokens)


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"n": 2}, "`sampling_params.n` is 2, which is not supported. Use --samples"),
        ({"n": True}, "`sampling_params.n` is True, which is not supported."),
        ({"length_penalty": 1.1}, "`sampling_params.length_penalty` is 1.1, which is not"),
        ({"repetition_penalty": 0}, "`sampling_params`: repetition_penalty is 0, expected more"),
        ({"frequency_penalty": 2.1}, "`sampling_params`: frequency_penalty is 2.1, expected -2"),
        ({"top_logprobs": 3}, "`sampling_params.top_logprobs` needs `logprobs` true beside it"),
        (
            {"logprobs": True, "top_logprobs": 50},
            "`sampling_params.top_logprobs` is 50, expected 0 to 20.",
        ),
        ({"logprobs": -1}, "`sampling_params`: logprobs is -1, expected 0 to 20."),
        ({"logprobs": "x"}, "`sampling_params.logprobs` is 'x', expected true, false or a whole"),
        ({"ignore_eos": 1}, "`sampling_params.ignore_eos` is 1, expected true or false."),
        ({"min_tokens": 600}, "`sampling_params.min_tokens`: 600 tokens are more than max_tokens"),
        ({"min_tokens": -1}, "`sampling_params`: min_tokens is -1, expected 0 or more."),
        ({"bad_words": [" "]}, "`sampling_params`: bad_words is [' '], expected texts that"),
        ({"logit_bias": [1]}, "`sampling_params.logit_bias` is [1], expected an object of token"),
        ({"logit_bias": {"a": 1}}, "`sampling_params.logit_bias` has 'a': 1, expected a token id"),
        ({"logit_bias": {"5": "1"}}, "`sampling_params.logit_bias` has '5': '1', expected a token"),
        ({"logit_bias": {"5": 1, "05": 2}}, "`sampling_params.logit_bias` names token 5 twice"),
        ({"logit_bias": {"5": 101}}, "`sampling_params`: logit_bias of token 5 is 101, expected"),
        ({"max_tokens": 1, "max_new_tokens": 2}, "`sampling_params.max_new_tokens` says"),
        ({"temperature": 10**400}, "`sampling_params.temperature` is 1000"),
        ({"temperature": float("nan")}, "`sampling_params`: temperature is nan"),
        ({"top_k": -2}, "`sampling_params`: top_k is -2, expected 0 or more."),
        ({"max_tokens": 4.5}, "`sampling_params.max_tokens` is 4.5, expected a whole number."),
        ({"max_tokens": float("inf")}, "`sampling_params.max_tokens` is inf, expected a whole"),
        ({"stop_token_ids": 1}, "`sampling_params.stop_token_ids` is 1, expected a list of token"),
        ({"stop_token_ids": [-1]}, "`sampling_params.stop_token_ids` is [-1], expected a list"),
        ('{"max_tokens": ', "`sampling_params` is '{\"max_tokens\": ', expected an object."),
    ],
)
def test_what_cannot_be_obeyed_is_refused(own, sentence):
    assert complaint(own).startswith(sentence)


def test_fields_can_be_ignored_and_the_row_says_so():
    request = ask({"length_penalty": 1.1, "n": None, "top_k": 3}, ignore_fields=("n", "top_k"))
    assert request.message.endswith("leave it aside with --ignore-fields length_penalty.")
    ignore = ("length_penalty", "n", "top_k")
    request = ask({"length_penalty": 1.1, "n": None, "top_k": 3}, ignore_fields=ignore)
    assert request.sampling == Sampling()
    assert request.item.notes == ("ignored `length_penalty`", "ignored `top_k`")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def structure(own, **options):
    return ask(own, **options).sampling.structure


@pytest.mark.parametrize(
    ("own", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            "json_schema",
            SCHEMA,
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}),
        ({"structured_outputs": '{"choice": ["a", "b"]}'}, "choice", ["a", "b"]),
        ({"guided_decoding": {"regex": "a+"}}, "regex", "a+"),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": '{"type": "integer"}'}, "json_schema", {"type": "integer"}),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
def test_an_item_says_what_its_answer_must_look_like(own, kind, value):
    assert structure(own) == structure_of(kind, value)
    assert structure(own, choice=("c",)) == structure_of(kind, value)


def test_the_job_says_it_for_all_and_an_item_may_be_free():
    assert structure(None, choice=("c",)) == structure_of("choice", ["c"])
    assert structure({"response_format": {"type": "text"}}, choice=("c",)) is None
    assert structure({"response_format": None}, choice=("c",)).kind == "choice"


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"response_format": "json"}, "expected an object whose `type` is text, json_object or"),
        ({"response_format": {"type": "json_schema"}}, "has no `json_schema.schema`; add it."),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"uniqueItems": True}},
                }
            },
            "`sampling_params.response_format.json_schema.schema` has `uniqueItems`, which is not "
            "supported; say it with other keywords.",
        ),
        ({"structured_outputs": {}}, "says 0 things, expected one of json, regex, choice, grammar"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "says 2 things, expected one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "has `structural_tag`, which is not s"),
        ({"guided_regex": "("}, "`sampling_params.guided_regex` cannot be followed (unclosed gr"),
        ({"guided_regex": "a", "guided_json": {}}, "`sampling_params.guided_json` and `sampling_"),
        ({"guided_regex": "a", "min_tokens": 1}, "min_tokens is 1, expected 0 beside a regex."),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos is True, expected false beside a"),
    ],
)
def test_a_structure_that_cannot_be_followed_fails_its_item(own, sentence):
    assert sentence in complaint(own)


def test_a_text_that_goes_on_has_no_thinking_before_its_structure():
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", choice=("a",), last_assistant="continue")
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "I say "}]
    for messages, after_thinking in ((said, False), (said[:1], True)):
        item = Item(0, "0", "d", "in.jsonl:1", {"messages": messages})
        request = to_request(item, spec, fake_render, 100)
        assert request.sampling.structure.after_thinking is after_thinking
