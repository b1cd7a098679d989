"""`show` prints a row per line, whatever the row holds."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from small_jobs import start, write_lines

from dspark_batch.cli.main import main
from dspark_batch.job.shown import first_rows

ROWS = [
    {
        "custom_id": "a-1",
        "prompt": "Name a sea.",
        "status": "succeeded",
        "completion": "The [red] Sea,\n\x1b[31mof course",
        "error": None,
        "metrics": {"speculative_decoding": {"mean_acceptance_length": 3.256}},
    },
    {
        "custom_id": "a-2",
        "prompt": None,
        "status": "errored",
        "completion": None,
        "error": {"code": "bad_record", "message": "no prompt"},
        "metrics": None,
    },
]


@pytest.fixture(params=["out.jsonl", "out.parquet"])
def output(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def test_shows_answers_and_failures_on_one_line_each(output, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["show", str(output)]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["custom_id", "prompt", "completion", "accept", "length"]
    assert "a-1" in first
    assert "Name a sea." in first
    assert first.rstrip().endswith("3.26")
    assert "The [red] Sea, [31mof course" in first  # markup is text, escapes are gone
    assert "a-2" in second
    assert "bad_record: no prompt" in second


def test_shows_as_many_rows_as_asked(output, capsys):
    main(["show", str(output), "-n", "1"])
    assert len(capsys.readouterr().out.splitlines()) == 2  # with the heading


def test_an_output_without_rows_is_no_error(tmp_path, capsys):
    path = tmp_path / "none.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS).slice(0, 0), path)
    assert main(["show", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_output_that_is_not_there_says_how_to_get_it(tmp_path, capsys):
    assert main(["show", str(tmp_path / "out.parquet")]) == 2
    assert "run its command again" in capsys.readouterr().err


TURNS = {"id": "t", "turns": ["first?", "second?"]}
CHAT = {
    "custom_id": "c",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "chat?"}]},
}
TEXT = {"custom_id": "x", "url": "/v1/completions", "body": {"prompt": "Once"}}
SAID = {"id": "s", "conversations": [{"from": "human", "value": "shared?"}]}


@pytest.mark.parametrize(
    ("records", "options", "prompts"),
    [
        ([TURNS, SAID], {}, ["second?", "shared?"]),
        ([{"q": "sea"}], {"template": "Name a {{ q }}."}, ["Name a sea."]),
        ([{"q": "a"}], {"template": "{{ q }}?", "drop": ("q",), "samples": 2}, ["a?", "a?"]),
        ([CHAT, TEXT], {"format": "openai"}, ["chat?", "Once"]),
        ([{"prompt": "p"}], {"output_column": "label", "output_prefix": "my_"}, ["p"]),
        ([{"prompt": "x" * 999}], {"on_overflow": "skip"}, ["x" * 999]),
    ],
)
def test_shows_what_was_asked_in_whatever_shape(tmp_path, records, options, prompts):
    write_lines(tmp_path / "in.jsonl", *records)
    start(tmp_path, **options)
    rows = first_rows(str(tmp_path / "out.jsonl"), 5)
    assert [row.prompt for row in rows] == prompts
    assert all(row.answer for row in rows)
    (tmp_path / "in.jsonl").unlink()
    assert len(first_rows(str(tmp_path / "out.jsonl"), 5)) == len(prompts)


def test_an_answer_without_a_prompt_is_not_shown_beside_another_records(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"id": "a", "prompt": "one"})
    start(tmp_path, drop=("prompt",))
    write_lines(tmp_path / "in.jsonl", {"id": "b", "prompt": "two"})
    [row] = first_rows(str(tmp_path / "out.jsonl"), 5)
    assert (row.custom_id, row.prompt) == ("a", "")
