"""Inputs that are odd or move while they are read: no record is lost or changed in silence."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import CONTEXT_LENGTH, fake_opener, fake_render, refuse_to_open
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.errors import Resumable, ResumeMismatch, UsageError
from dspark_batch.intake.mapping import to_request
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Failure, Item


def test_a_fifo_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "in.jsonl")
    with pytest.raises(UsageError, match="is no file, but a job reads its input again; pipe it"):
        start(tmp_path, opener=refuse_to_open)


def test_a_pattern_never_takes_the_files_of_a_run_directory(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b"))
    inputs = (f"{tmp_path}/**/*.jsonl",)
    for _ in range(2):  # the second start finds rows.jsonl and attempts.jsonl of the first
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, inputs=inputs, observe=stop_after_first)
    assert start(tmp_path, inputs=inputs).total == 2
    (tmp_path / "out.jsonl").rename(tmp_path / "kept.txt")
    assert start(tmp_path, inputs=inputs, out=f"{tmp_path}/other.jsonl").total == 2


def stop_after_first(tick):
    if tick.outcome:
        raise KeyboardInterrupt


def test_a_journal_is_refused_as_an_input(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    start(tmp_path)
    with pytest.raises(UsageError, match=r"rows.jsonl: belongs to the run directory of a job"):
        start(tmp_path, inputs=(f"{tmp_path}/out.jsonl.run/rows.jsonl",), out=f"{tmp_path}/b.jsonl")


def test_a_folder_that_is_only_named_like_a_run_directory_holds_inputs(tmp_path):
    (tmp_path / "first.run").mkdir()
    write_lines(tmp_path / "first.run" / "in.jsonl", *prompts("a"))
    assert start(tmp_path, inputs=(f"{tmp_path}/*/*.jsonl",)).total == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_file_names_that_are_no_text_are_files_like_others(tmp_path, suffix):
    folder = os.fsencode(tmp_path)
    raw = folder + b"/caf\xe9.jsonl"
    with open(raw, "wb") as file:  # noqa: PTH123
        file.write(b'{"prompt":"a"}\nnope\n')
    name, out = os.fsdecode(raw), os.fsdecode(folder + b"/\xfc." + suffix.encode())
    for opener in (fake_opener(), refuse_to_open):
        assert start(tmp_path, inputs=(name,), out=out, opener=opener).total == 2
    plain = tmp_path / f"out.{suffix}"  # a name that pyarrow can read
    Path(out).rename(plain)
    [_, bad] = rows_in(plain)
    assert bad["error"]["message"].startswith(f"{tmp_path}/caf?.jsonl:2: not JSON")


def test_an_arrow_file_whose_name_is_no_text_is_refused(tmp_path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.parquet"
    with open(raw, "wb") as file:  # noqa: PTH123
        file.write(b"x")
    with pytest.raises(UsageError, match="has a name that is not UTF-8; rename it"):
        start(tmp_path, inputs=(os.fsdecode(raw),))


@pytest.mark.parametrize("option", [{"system_prompt": "\udcff"}, {"stop": ("a", "\ud800")}])
def test_options_that_are_no_text_are_refused(option):
    with pytest.raises(UsageError, match="is not UTF-8; give it as text"):
        Spec(inputs=("in.jsonl",), out="out.jsonl", **option)


@pytest.mark.parametrize(
    "digits",
    [
        *("18446744073709551615", "-9223372036854775808", '"' + "9" * 50 + '"'),
        *("18446744073709551616", "-9223372036854775809", "9" * 400),
    ],
)
def test_an_integer_of_any_size_passes_through(tmp_path, digits):
    line = b'{"prompt":"a","deep":[{"n":%s}]}' % digits.encode()
    write_lines(tmp_path / "in.jsonl", line, *prompts("b"))
    assert start(tmp_path).succeeded == 2
    [row, _] = rows_in(tmp_path / "out.jsonl")
    assert row["deep"] == json.loads(line)["deep"]


def grow(path, *records):
    with path.open("ab") as file:
        for record in records:
            file.write(json.dumps(record).encode() + b"\n")


def test_records_that_are_added_while_the_job_runs_wait_for_the_next_start(tmp_path, caplog):
    path = write_lines(tmp_path / "in.jsonl", *prompts("a", "b"))
    added = prompts("c", "d", "e")

    def add(tick):
        if tick.outcome and added:
            grow(path, added.pop())

    assert start(tmp_path, observe=add).total == 2
    assert caplog.messages == [
        f"{path} grew while the job ran; run the same command again for the rest"
    ]
    assert start(tmp_path).resumed == 2
    assert [row["id"] for row in rows_in(tmp_path / "out.jsonl")] == [
        "id-a",
        "id-b",
        "id-e",
        "id-d",
    ]


@pytest.mark.parametrize("stage", ["load", "finish"])
def test_a_line_that_is_still_being_written_is_whole_in_the_end(tmp_path, stage):
    path = write_lines(tmp_path / "in.jsonl", *prompts("a"))
    with path.open("ab") as file:
        file.write(b'{"id":"id-b","pro')

    def finish_line(tick):
        if tick.stage == stage and path.read_bytes().endswith(b"pro"):
            with path.open("ab") as file:
                file.write(b'mpt":"b"}\n')

    if stage == "finish":  # half of it was answered
        with pytest.raises(Resumable, match="the input changed while the job ran"):
            start(tmp_path, observe=finish_line)
    else:
        start(tmp_path, observe=finish_line)
    assert start(tmp_path).succeeded == 2
    assert len(rows_in(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize("piped", [b"", b'{"prompt":"other"}\n'])
@pytest.mark.parametrize("complete", [True, False])
def test_standard_input_that_is_not_the_same_is_refused(tmp_path, monkeypatch, complete, piped):
    def pipe(content, **options):
        (tmp_path / "piped").write_bytes(content)
        with (tmp_path / "piped").open() as stream:
            monkeypatch.setattr("sys.stdin", stream)
            return start(tmp_path, inputs=("-",), **options)

    whole = write_lines(tmp_path / "x", *prompts("a", "b")).read_bytes()
    if complete:
        pipe(whole)
    else:
        with pytest.raises(KeyboardInterrupt):
            pipe(whole, observe=stop_after_first)
    with pytest.raises(ResumeMismatch, match="standard input is not what the first start read"):
        pipe(piped)
    assert (tmp_path / "out.jsonl.run/stdin.jsonl").read_bytes() == whole  # the copy is kept
    assert pipe(whole).resumed == (2 if complete else 1)
    assert pipe(b'{"prompt":"other"}\n', overwrite=True).total == 1


def test_an_empty_file_among_others_is_no_error(tmp_path):
    write_lines(tmp_path / "a.jsonl", *prompts("a"))
    write_lines(tmp_path / "b.jsonl")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "c.parquet")
    report = start(tmp_path, inputs=(f"{tmp_path}/[abc].*",), out=f"{tmp_path}/out.parquet")
    assert report.total == 1


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()])
def test_parquet_prompts_of_every_kind_of_string(tmp_path, kind):
    values = pa.array(["a", "b"]).cast(kind)
    pq.write_table(pa.table({"prompt": values}), tmp_path / "in.parquet")
    report = start(tmp_path, inputs=(f"{tmp_path}/in.parquet",), out=f"{tmp_path}/out.parquet")
    assert report.succeeded == 2


def test_parquet_prompts_that_are_dictionaries_and_messages_that_are_nested(tmp_path):
    turns = [[{"role": "user", "content": "x"}], None]
    words = pa.array([None, "b"]).dictionary_encode()
    pq.write_table(pa.table({"prompt": words, "messages": turns}), tmp_path / "in.parquet")
    report = start(tmp_path, inputs=(f"{tmp_path}/in.parquet",), out=f"{tmp_path}/out.parquet")
    assert report.succeeded == 2


@pytest.mark.parametrize("nothing", [pa.array([None, "b"]), pa.array([None, None], pa.null())])
def test_parquet_prompts_that_are_null_fail_alone(tmp_path, nothing):
    pq.write_table(pa.table({"prompt": nothing}), tmp_path / "in.parquet")
    report = start(tmp_path, inputs=(f"{tmp_path}/in.parquet",), out=f"{tmp_path}/out.parquet")
    assert (report.total, report.errored) == (2, nothing.null_count)
    [first, _] = rows_in(tmp_path / "out.parquet")
    assert first["error"]["message"].endswith("in.parquet:1: `prompt` is null, expected a string.")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_nul_in_a_prompt_is_a_character(tmp_path, suffix):
    write_lines(tmp_path / "in.jsonl", b'{"prompt":"a\\u0000b"}', *prompts("c"))
    start(tmp_path, out=f"{tmp_path}/out.{suffix}")
    [row, _] = rows_in(tmp_path / f"out.{suffix}")
    assert (row["prompt"], row["error"]) == ("a\0b", None)


def mapped(record, **options):
    spec = Spec(inputs=("in.jsonl",), out="out.jsonl", **options)
    return to_request(Item(0, "0", "d", "in.jsonl:1", record), spec, fake_render, CONTEXT_LENGTH)


@pytest.mark.parametrize(("beyond", "room"), [(-2, 2), (-1, 1), (0, None), (1, None)])
def test_a_prompt_at_the_limit_of_the_context(beyond, room):
    frame = len(fake_render([{"role": "user", "content": ""}]))
    outcome = mapped({"prompt": "x" * (CONTEXT_LENGTH - frame + beyond)})
    if room:
        assert (len(outcome.prompt_ids), outcome.max_tokens) == (CONTEXT_LENGTH - room, room)
    else:
        assert (type(outcome), outcome.code) == (Failure, "prompt_too_long")


@pytest.mark.parametrize(
    "record",
    [{"prompt": " \t"}, {"prompt": "x"}, {"messages": [{"role": "user", "content": "s"}]}],
)
def test_blank_and_short_prompts_are_asked_as_they_are(record):
    [text] = [record.get("prompt") or record["messages"][0]["content"]]
    assert mapped(record).prompt_ids[-len(text) - 1 : -1] == tuple(map(ord, text))


def test_one_token_is_an_answer_and_no_tokens_are_a_mistake(tmp_path):
    record = {"prompt": "a", "sampling_params": {"max_tokens": 0}}
    write_lines(tmp_path / "in.jsonl", *prompts("a"), record)
    start(tmp_path, max_tokens=1)
    one, none = rows_in(tmp_path / "out.jsonl")
    assert (len(one["token_ids"]), one["finish_reason"]) == (1, "length")
    assert "`sampling_params.max_tokens` is 0, expected 1 or more" in none["error"]["message"]
    with pytest.raises(UsageError, match="max_tokens is 0, expected 1 or more"):
        start(tmp_path, max_tokens=0)
