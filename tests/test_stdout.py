"""`-o -`: rows on standard output, each as it finishes, and nothing kept."""

import importlib
import json
import sys
import tempfile

import pytest
from fakes import FakeEngine, fake_opener
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.cli.main import main
from dspark_batch.errors import Resumable, UsageError
from dspark_batch.spec.spec import Spec

run_module = importlib.import_module("dspark_batch.run")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an input, and a place for temporary files that a test can look into."""
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b"), b"nope", {"prompt": "c", "n": 1})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(rows):
    return {row["custom_id"]: {k: v for k, v in row.items() if k != "metrics"} for row in rows}


@pytest.mark.parametrize("options", [{}, {"keep": ("n",), "output_prefix": "o_"}, {"samples": 2}])
def test_the_rows_are_those_of_a_file_as_soon_as_each_is_there(folder, capsysbinary, options):
    written = []

    def count(tick):
        if tick.outcome:
            written.append(capsysbinary.readouterr().out)
            assert written[-1].endswith(b"\n")

    report = start(folder, out="-", observe=count, **options)
    start(folder, **options)
    rows = [json.loads(line) for line in b"".join(written).splitlines()]
    assert len(rows) == len(written) == report.total
    key = lambda row: json.dumps({k: v for k, v in row.items() if k != "metrics"})  # noqa: E731
    assert sorted(map(key, rows)) == sorted(map(key, rows_in(folder / "out.jsonl")))
    assert (report.out, report.errored) == ("-", 1 * options.get("samples", 1))


def test_response_lines_of_openai_go_there_too(folder, capsysbinary):
    body = {"custom_id": "x", "url": "/v1/completions", "body": {"prompt": "p"}}
    write_lines(folder / "in.jsonl", body)
    start(folder, out="-", format="openai")
    (line,) = capsysbinary.readouterr().out.splitlines()
    assert json.loads(line)["response"]["status_code"] == 200


@pytest.mark.parametrize("stage", ["end", "stop", "crash"])
def test_nothing_is_left_on_the_disk(folder, stage):
    before = set(folder.rglob("*"))
    engine = FakeEngine(slots=1, dies_after=1 if stage == "crash" else None)
    try:
        start(folder, out="-", engine=engine, is_asked=lambda: stage == "stop")
    except (KeyboardInterrupt, Resumable):
        assert stage != "end"
    assert set(folder.rglob("*")) == before


def test_who_stops_early_is_told_that_nothing_else_is_kept(folder):
    with pytest.raises(Resumable) as error:
        start(folder, out="-", is_asked=lambda: True)
    assert str(error.value).startswith("-: stopped as asked, ")
    assert "the same command" not in str(error.value)
    assert "Name a file with -o to be able to continue." in str(error.value)


def test_nobody_who_reads_ends_the_run(folder, monkeypatch):
    class Full:
        class buffer:
            @staticmethod
            def write(line):
                raise BrokenPipeError(32, "Broken pipe")

    engine = FakeEngine(slots=1)
    monkeypatch.setattr(sys, "stdout", Full)
    with pytest.raises(Resumable, match=r"^-: cannot be written \(Broken pipe\)\. Rows that were"):
        start(folder, out="-", engine=engine)
    assert engine.pulled == 1


def test_nothing_can_be_resumed(folder):
    with pytest.raises(UsageError, match="-o - keeps nothing to resume"):
        Spec(inputs=("in.jsonl",), out="-", resume="always")


@pytest.mark.usefixtures("folder")
def test_the_summary_goes_to_standard_error(monkeypatch, capsys):
    run = run_module.run
    opener = {"open_engine": fake_opener()}
    monkeypatch.setattr(run_module, "run", lambda spec, **watch: run(spec, **watch | opener))
    assert main(["run", "in.jsonl", "-o", "-"]) == 1
    out, err = capsys.readouterr()
    assert len([json.loads(line) for line in out.splitlines()]) == 4
    assert "3 succeeded" in err


@pytest.mark.parametrize("words", [["-o", "-"], ["--out=-"], ["-o-"], ["--out", "-"]])
def test_a_first_ctrl_c_promises_nothing(folder, monkeypatch, capsys, words):
    def interrupted(spec, **watch):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", interrupted)
    assert main(["run", "in.jsonl", *words]) == 130
    assert "stopped; the rows that were written are whole, and nothing else is kept" in (
        capsys.readouterr().err
    )
