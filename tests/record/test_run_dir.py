"""What a run directory tells those who only look at it."""

import io
import os

import pytest
from fakes import FakeEngine
from small_jobs import prompts, start, write_lines

from dspark_batch.errors import OutputInUse, UsageError
from dspark_batch.record.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c"))
    return RunDir(str(tmp_path / "out.jsonl"))


def test_names_the_process_that_holds_it_and_nobody_afterwards(run_dir):
    assert run_dir.holder() is None
    with run_dir.lock():
        assert run_dir.holder().startswith(f"process {os.getpid()} on ")
    assert run_dir.holder() is None


def test_one_who_looks_leaves_nothing_behind(run_dir):
    run_dir.holder()
    assert run_dir.starts() == []
    assert not run_dir.path.exists()


@pytest.mark.parametrize("lines", [(), ({"question": "a"},)])
def test_a_start_that_is_refused_leaves_nothing_behind(run_dir, tmp_path, lines):
    write_lines(tmp_path / "in.jsonl", *lines)
    with pytest.raises(UsageError):
        start(tmp_path)
    assert not run_dir.path.exists()


def test_standard_input_that_is_refused_leaves_nothing_behind(run_dir, tmp_path, monkeypatch):
    with (tmp_path / "piped").open("w+b") as file:
        file.write(b"id,prompt\n1,a\n")
        file.seek(0)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        with pytest.raises(UsageError, match="<stdin>: is a table of text and no JSON"):
            start(tmp_path, inputs=("-",))
    assert not run_dir.path.exists()


def test_a_directory_that_its_holder_took_away_is_held_by_nobody(run_dir):
    run_dir.path.mkdir()
    with run_dir.lock():
        (run_dir.path / "lock").rename(run_dir.path / "old")  # as if another start had made it
        with run_dir.lock():
            assert run_dir.holder()
    fd = run_dir._open_lock()
    (run_dir.path / "lock").unlink()
    with pytest.raises(OutputInUse):
        run_dir._take(fd)
    os.close(fd)


def test_every_start_that_generates_is_noted(run_dir, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, engine=FakeEngine(slots=1, dies_after=2))
    start(tmp_path)
    start(tmp_path)  # nothing to do
    assert [(each.total, each.resumed) for each in run_dir.starts()] == [(3, 0), (3, 2)]
    first, second = (each.began for each in run_dir.starts())
    assert first <= second


def test_rows_know_when_they_were_finished_and_the_output_does_not(run_dir, tmp_path):
    start(tmp_path)
    assert run_dir.rows.read_bytes().count(b'"finished_at":1') == 3
    assert b"finished_at" not in run_dir.out.read_bytes()
