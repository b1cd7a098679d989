"""A disk that is full stops the run, keeps every row, and the same command ends it."""

import pytest
from processes import spawn
from small_jobs import prompts, start, write_lines

RESUMABLE = 75


@pytest.fixture
def calm(tmp_path):
    """The output of a run that nothing disturbed."""
    write_lines(tmp_path / "in.jsonl", *prompts(*(f"p{i}" for i in range(8))))
    start(tmp_path, out=str(tmp_path / "calm.jsonl"))
    return (tmp_path / "calm.jsonl").read_bytes()


@pytest.mark.parametrize("fsync_every", [1, 100])
def test_a_journal_that_cannot_grow_is_resumable(tmp_path, calm, fsync_every):
    process = spawn(tmp_path, largest_file=2500, fsync_every=fsync_every)
    said = process.communicate()[1].decode()
    assert process.returncode == RESUMABLE
    assert said.startswith(
        f"{tmp_path}/out.jsonl.run/rows.jsonl: cannot be written (File too large)"
    )
    assert said.endswith("make room for it and run the same command again.")
    journal = (tmp_path / "out.jsonl.run/rows.jsonl").read_bytes()
    assert 0 < journal.count(b"\n") < 8
    assert journal.endswith(b"\n")  # the torn row was taken back
    report = start(tmp_path)
    assert report.resumed == journal.count(b"\n")
    assert (tmp_path / "out.jsonl").read_bytes() == calm


def test_an_output_that_cannot_be_written_is_resumable_and_leaves_no_half(tmp_path, calm):
    padded = [record | {"pad": "x" * 1000} for record in prompts("a", "b", "c", "d")]
    write_lines(tmp_path / "in.jsonl", *padded)
    process = spawn(tmp_path, largest_file=3500)
    said = process.communicate()[1].decode()
    assert (process.returncode, "out.jsonl: cannot be written" in said) == (RESUMABLE, True)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in.jsonl", "out.jsonl.run", "calm.jsonl", "calm.jsonl.run")
    }
    assert start(tmp_path).resumed == 4


def test_a_manifest_that_cannot_be_written_is_resumable(tmp_path, calm):
    process = spawn(tmp_path, largest_file=100)
    said = process.communicate()[1].decode()
    assert (process.returncode, "manifest.json: cannot be written" in said) == (RESUMABLE, True)
    start(tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == calm
