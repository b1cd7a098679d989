"""A disk that is full stops the run, keeps every row, and the same command ends it."""

import errno
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import spawn
from small_jobs import prompts, start, write_lines

from dspark_batch.errors import DsparkBatchError

RESUMABLE = 75


@pytest.fixture
def calm(tmp_path):
    """The output of a run that nothing disturbed."""
    write_lines(tmp_path / "in.jsonl", *prompts(*(f"p{i}" for i in range(16))))
    start(tmp_path, out=str(tmp_path / "calm.jsonl"))
    return (tmp_path / "calm.jsonl").read_bytes()


@pytest.mark.parametrize("fsync_every", [1, 100])
def test_a_journal_that_cannot_grow_is_resumable(tmp_path, calm, fsync_every):
    process = spawn(tmp_path, largest_file=6000, fsync_every=fsync_every)
    said = process.communicate()[1].decode()
    assert process.returncode == RESUMABLE
    assert said.startswith(
        f"{tmp_path}/out.jsonl.run/rows.jsonl: cannot be written (File too large)"
    )
    assert said.endswith("make room for it and run the same command again.")
    journal = (tmp_path / "out.jsonl.run/rows.jsonl").read_bytes()
    assert 0 < journal.count(b"\n") < 16
    assert journal.endswith(b"\n")  # the torn row was taken back
    report = start(tmp_path)
    assert report.resumed == journal.count(b"\n")
    assert (tmp_path / "out.jsonl").read_bytes() == calm


def test_an_output_that_cannot_be_written_is_resumable_and_leaves_no_half(tmp_path, calm):
    padded = [record | {"pad": "x" * 2000} for record in prompts("a", "b", "c", "d")]
    write_lines(tmp_path / "in.jsonl", *padded)
    process = spawn(tmp_path, largest_file=6000)
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


class FullDisk:
    """From the n-th call on nothing can be written, made or synced; `calls` counts them."""

    def __init__(self, full_at, patch):
        self.full_at, self.calls = full_at, 0
        for name in ("write", "pwrite", "fsync", "mkdir"):
            patch.setattr(os, name, self._refusing(getattr(os, name)))
        patch.setattr(io, "open", self._refusing(io.open, lambda file, mode="r", *_: "w" in mode))

    def _refusing(self, real, writes=lambda *args: True):
        def call(*args, **kwargs):
            self.calls += writes(*args)
            if self.calls >= self.full_at and writes(*args):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_disk_that_is_full_from_any_call_on_is_said_and_the_same_command_goes_on(
    tmp_path, monkeypatch, suffix
):
    inputs = (str(write_lines(tmp_path / "in.jsonl", *prompts("a", "b"), b"nope")),)
    start(tmp_path, inputs=inputs, out=f"{tmp_path}/calm.{suffix}")
    calm, codes, said = (tmp_path / f"calm.{suffix}").read_bytes(), [], []
    for full_at in range(1, 200):
        out = tmp_path / str(full_at) / f"out.{suffix}"
        with monkeypatch.context() as patch:
            disk = FullDisk(full_at, patch)
            try:
                codes.append(start(tmp_path, inputs=inputs, out=str(out)).exit_code)
            except DsparkBatchError as error:
                codes.append(error.exit_code)
                said.append(str(error))
        assert not out.exists() or out.read_bytes() == calm, full_at  # never a half
        assert start(tmp_path, inputs=inputs, out=str(out)).exit_code == 1  # one record is bad
        assert out.read_bytes() == calm, full_at
        if disk.calls < full_at:
            break
    unmade = codes.index(RESUMABLE)  # until the run directory is there, another may be chosen
    assert codes == [2] * unmade + [RESUMABLE] * (len(codes) - unmade - 1) + [1]
    assert unmade < 10 < len(codes)
    assert all("No space left on device" in sentence for sentence in said)


def test_little_space_is_said_before_the_start(tmp_path, monkeypatch, caplog):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    start(tmp_path, max_tokens=10)
    assert caplog.messages == []
    start(tmp_path, max_tokens=1000, overwrite=True)
    assert caplog.messages == [
        f"{tmp_path}/out.jsonl.run: rows and output may take up to 0.0 GB, and 0.0 GB are free. A "
        "full disk stops the run with every finished row safe; then make room and run the same "
        "command again."
    ]


def test_a_run_directory_may_be_on_another_file_system(tmp_path, calm):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    elsewhere = other / f"{tmp_path.name}-{os.getpid()}"
    elsewhere.mkdir()
    try:
        (tmp_path / "out.jsonl.run").symlink_to(elsewhere)
        start(tmp_path)
    finally:
        shutil.rmtree(elsewhere)
    assert (tmp_path / "out.jsonl").read_bytes() == calm


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory without writers")
def test_a_directory_that_cannot_be_written_is_refused(tmp_path, calm):
    process = spawn(tmp_path, out="/proc/nowhere/out.jsonl")  # for root, too
    said = process.communicate()[1].decode()
    assert process.returncode == 2
    assert "/proc/nowhere/out.jsonl.run: the run directory cannot be made here" in said
