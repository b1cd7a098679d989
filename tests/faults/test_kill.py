"""Real processes, really killed."""

import random
import signal
import socket

import pytest
from processes import spawn, wait_for_bytes
from small_jobs import prompts, start, write_lines

from dspark_batch.errors import OutputInUse


def test_kills_at_random_sizes_of_the_journal_change_no_byte_of_the_output(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts(*(f"p{i}" for i in range(30))), b"[]")
    start(tmp_path, out=str(tmp_path / "calm.jsonl"))
    journal = tmp_path / "out.jsonl.run/rows.jsonl"
    chance, size = random.Random(7), 0
    for _ in range(4):
        process = spawn(tmp_path, pause_s=0.003, slots=3)
        size += chance.randrange(500, 3000)
        wait_for_bytes(journal, size, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert not (tmp_path / "out.jsonl").exists()
    report = start(tmp_path)
    assert report.resumed > 5
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


@pytest.fixture
def running(tmp_path):
    """A job in another process, in the middle of its work."""
    write_lines(tmp_path / "in.jsonl", *prompts(*(f"p{i}" for i in range(500))))
    process = spawn(tmp_path, pause_s=0.02)
    wait_for_bytes(tmp_path / "out.jsonl.run/rows.jsonl", 1, process)
    yield process
    process.kill()
    process.wait()
    process.stderr.close()


def test_a_second_run_on_the_same_output_is_refused_and_names_the_first(tmp_path, running):
    holder = f"process {running.pid} on {socket.gethostname()}"
    with pytest.raises(OutputInUse, match=f"out.jsonl is in use by {holder}; wait") as error:
        start(tmp_path)
    assert error.value.exit_code == 5
    with pytest.raises(OutputInUse):
        start(tmp_path, overwrite=True)
    assert running.poll() is None


def test_a_killed_run_blocks_nobody(tmp_path, running):
    running.kill()
    running.wait()
    report = start(tmp_path, limit=2)
    assert (report.total, report.exit_code) == (2, 0)
