"""`show` prints a row per line, whatever the row holds."""

import json
from contextlib import suppress

import pyarrow
import pyarrow.parquet
import pytest
from fakes import FakeEngine
from small_jobs import prompts, start, write_lines

from dspark_batch.cli.main import main
from dspark_batch.output.shown import first_rows, rows_of

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
    assert "no such file, and no job that makes it" in capsys.readouterr().err


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


LONG = "First line.\n\tSecond \x1b[31mline, " + "which is long. " * 12


@pytest.fixture(params=["out.jsonl", "out.parquet"])
def folder(request, tmp_path):
    """A job with a long prompt, a failure, and two samples of each record."""
    write_lines(tmp_path / "in.jsonl", {"id": "a", "prompt": LONG}, b"nope", *prompts("b", "c"))
    out = f"{tmp_path}/{request.param}"
    start(tmp_path, out=out, samples=2, temperature=1.0, output_prefix="my_")
    return out


def shown(capsys, *words):
    assert main(["show", *words]) == 0
    return capsys.readouterr().out


def test_an_item_in_full_has_all_its_text_with_its_line_breaks(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = shown(capsys, folder, "--full", "a")
    first, _, second = text.partition("── a, sample 1, ")
    for part in (first, second):
        assert LONG.strip().replace("\x1b", " ") in part
        assert "completion:\n" in part
    assert "bad_record: " in shown(capsys, folder, "--full", "#1")
    assert "in.jsonl:2: not JSON" in shown(capsys, folder, "--full", "#1")


def test_an_item_that_is_not_there_is_said_so(folder, capsys):
    assert main(["show", folder, "--full", "nobody"]) == 2
    assert "no row has the custom_id nobody" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        (["my_status=errored"], ["#1", "#1"]),
        (["my_error.code=bad_record", "id=id-c"], ["#1", "#1", "id-c", "id-c"]),
        (["my_status=nothing"], []),
    ],
)
def test_only_the_rows_for_which_a_condition_holds(folder, capsys, where, ids):
    words = [word for each in where for word in ("--where", each)]
    _, *rows = shown(capsys, folder, *words).splitlines()
    assert [row.split()[0] for row in rows] == ids


def test_a_condition_that_no_row_meets_is_said_so(folder, capsys):
    assert main(["show", folder, "--where", "my_status=new"]) == 0
    assert capsys.readouterr().err.endswith(": no row has my_status=new.\n")


def test_a_condition_about_a_column_that_no_row_has_is_a_mistake(folder, capsys):
    assert main(["show", folder, "--where", "my_statsu=errored"]) == 2
    assert "has such a column; did you mean my_status; columns are" in capsys.readouterr().err


def test_a_condition_goes_before_the_number_of_rows(folder, capsys):
    _, *rows = shown(capsys, folder, "--where", "id=id-c", "-n", "1").splitlines()
    assert len(rows) == 1
    assert rows[0].startswith("id-c")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ["rows", "openai"])
def test_a_job_that_runs_or_was_stopped_shows_the_rows_there_are(tmp_path, capsys, suffix, form):
    if (suffix, form) == ("parquet", "openai"):
        return
    out, seen = f"{tmp_path}/out.{suffix}", []
    write_lines(tmp_path / "in.jsonl", *prompts(*"abcd"), {"id": "t", "prompt": "a\nb"})

    def look(tick):
        if tick.outcome and tick.done == 2:
            seen.append(shown(capsys, out, "-n", "9"))

    engine = FakeEngine(slots=2, dies_after=4)
    with suppress(KeyboardInterrupt):
        start(tmp_path, engine=engine, observe=look, out=out, format=form)
    stopped = shown(capsys, out, "-n", "9")
    for text, ids in ((seen[0], "ab"), (stopped, "abcd")):
        _, *rows = text.splitlines()
        assert [row.split()[:2] for row in rows] == [[f"id-{name}", name] for name in ids]
    assert "prompt:\nc\n" in shown(capsys, out, "--full", "id-c")
    assert main(["show", out, "--full", "t"]) == 2  # it has no row yet


def test_the_reasoning_of_an_item_in_full_has_a_heading_of_its_own(tmp_path, capsys):
    row = ROWS[0] | {"reasoning": "Let me think.", "finish_reason": "stop"}
    path = write_lines(tmp_path / "out.jsonl", row, row | {"custom_id": "b", "completion": None})
    text = shown(capsys, str(path), "--full", "a-1")
    assert text.startswith("── a-1, stop\nprompt:\nName a sea.\n")
    assert "reasoning:\nLet me think.\n\ncompletion:\nThe [red] Sea,\n" in text
    assert "(still thinking) Let me" in shown(capsys, str(path))


@pytest.mark.parametrize(
    "line",
    [
        {"custom_id": "a", "response": "a text"},
        {"custom_id": "a", "response": {"body": {"choices": ["x"], "metrics": 3}}},
        {"custom_id": "a", "error": "out of luck", "metrics": "none"},
        {"custom_id": "a", "completion": 5, "reasoning": ["x"], "sample_index": "first"},
    ],
)
def test_lines_of_other_programs_are_shown_as_far_as_they_are_understood(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    (shown,) = rows_of(str(tmp_path / "rows.jsonl"))
    assert shown.custom_id == "a"
    assert isinstance(shown.answer, str)
