import pytest

from dspark_batch.errors import UsageError
from dspark_batch.spec.spec import Spec


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"inputs": ()}, "no input: name at least one file, or - for standard input."),
        ({"out": "s3:/b/o.jsonl"}, "s3:/b/o.jsonl: a URL has two slashes; write s3://b/o.jsonl."),
        ({"out": "~/o.jsonl"}, "~/o.jsonl: ~ is a folder of this name here; write the whole path."),
        ({"out": "o.csv"}, "o.csv: expected an output that ends in .jsonl or .parquet; rename it."),
        ({"max_tokens": 0}, "max_tokens is 0, expected 1 or more."),
        ({"slots": 0}, "slots is 0, expected 1 or more."),
        ({"slots": 1025}, "slots is 1025, expected 1 to 1024, or auto."),
        (
            {"out": "-", "resume": "always"},
            "-o - keeps nothing to resume; drop resume=always, or name a file.",
        ),
        ({"limit": 0}, "limit is 0, expected 1 or more."),
        ({"fsync_every": 0}, "fsync_every is 0, expected 1 or more."),
        (
            {"resume": "yes"},
            "resume is yes, expected one of if-possible, always, never.",
        ),
        ({"draft_length": -1}, "draft_length is -1, expected 0 or more."),
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 or more."),
        ({"temperature": float("inf")}, "temperature is inf, expected 0 or more."),
        ({"top_p": 0}, "top_p is 0, expected more than 0, at most 1."),
        ({"top_k": -1}, "top_k is -1, expected 0 or more."),
        ({"min_p": 1.1}, "min_p is 1.1, expected 0 to 1."),
        ({"presence_penalty": 3}, "presence_penalty is 3, expected -2 to 2."),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected more than 0, at most 100."),
        ({"bad_words": ("",)}, "bad_words is [''], expected texts that are not empty."),
        (
            {"min_tokens": 5, "max_tokens": 4},
            "min_tokens is 5, expected at most max_tokens, 4.",
        ),
        ({"stop": ("a", "")}, "stop is ['a', ''], expected strings that are not empty."),
        *(
            ({"stop": many}, "stop is 1001, expected at most 1000 texts of 1000 characters.")
            for many in (("a",) * 1001, ("a" * 1001,))
        ),
        ({"sampling": "best"}, "sampling is best, expected one of coupled, rejection."),
        ({"confidence_threshold": 2}, "confidence_threshold is 2, expected 0 to 1."),
        (
            {"lookup": True, "draft_length": 0},
            "lookup drafts, and draft_length 0 decodes plainly; drop one of them.",
        ),
        (
            {"lookup": True, "sampling": "rejection"},
            "lookup changes no answer, but by the rejection rule every draft may; use sampling "
            "coupled, or drop lookup.",
        ),
        (
            {"lookup": True, "log_confidence": True},
            "log_confidence is about the drafter's drafts, and lookup puts others in their place; "
            "drop one of them.",
        ),
        ({"samples": 0}, "samples is 0, expected 1 or more."),
        (
            {"dtype": "float8"},
            "dtype is float8, expected one of float32, bfloat16, float16; did you mean float32.",
        ),
        (
            {"on_overflow": "cut"},
            "on_overflow is cut, expected one of error, skip, truncate-left, truncate-right.",
        ),
        (
            {"format": "open-ai"},
            "format is open-ai, expected one of rows, openai; did you mean openai.",
        ),
        (
            {"keep": ("a",), "drop": ("b",)},
            "keep and drop exclude each other; name the columns in one of them.",
        ),
        (
            {"out": "o.parquet", "format": "openai"},
            "o.parquet: format openai is written to .jsonl only; rename it.",
        ),
        (
            {"samples": 2, "format": "openai"},
            "samples is 2, but format openai has one answer per request; use format rows.",
        ),
        (
            {"keep": ("a",), "format": "openai"},
            "keep is about columns, which format openai has not; drop it.",
        ),
        ({"deadline": "7"}, "deadline is '7', expected a time of the day such as 07:00."),
        ({"max_runtime": "6"}, "max_runtime is '6', expected a duration such as 6h, 1h30m or 90s."),
        ({"drafter_bits": 7}, "drafter_bits is 7, expected one of auto, stored, 2, 3, 4, 5, 6, 8."),
        ({"target_bits": 1}, "target_bits is 1, expected one of 2, 3, 4, 5, 6, 8."),
        ({"target_bits": True}, "target_bits is True, expected one of 2, 3, 4, 5, 6, 8."),
        (
            {"overwrite": True, "resume": "always"},
            "overwrite and resume=always exclude each other; drop one of them.",
        ),
    ],
)
def test_refuses_what_no_job_can_be(options, sentence):
    with pytest.raises(UsageError) as error:
        Spec(**{"inputs": ("a.jsonl",), "out": "o.jsonl"} | options)
    assert str(error.value) == sentence


def test_a_draft_length_of_zero_is_plain_decoding():
    assert Spec(inputs=("a.jsonl",), out="o.parquet", draft_length=0).draft_length == 0
