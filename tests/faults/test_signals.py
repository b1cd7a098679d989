"""A stopped run finishes what is in flight, within its grace, and the same command goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import wait_for_bytes
from small_jobs import prompts, start, write_lines

from dspark_batch.errors import Resumable

RUNS = """
import importlib, sys
from functools import partial
sys.path.insert(0, sys.argv.pop(1))
from fakes import FakeEngine, fake_opener
from dspark_batch.cli.main import main

run_module = importlib.import_module("dspark_batch.run")
opener = fake_opener(FakeEngine(slots=4, pause_s=float(sys.argv.pop(1))))
run_module.run = partial(run_module.run, open_engine=opener)
sys.exit(main())
"""


@pytest.fixture
def running(tmp_path):
    """Start the command on twelve items, and wait until its first row is there."""
    write_lines(tmp_path / "in.jsonl", *prompts(*"abcdefghijkl"))
    processes = []

    def begin(*words, pause_s=0.1, rows=1):
        command = [sys.executable, "-c", RUNS, str(Path(__file__).parents[1]), str(pause_s)]
        command += ["run", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *words]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        processes.append(process)
        wait_for_bytes(tmp_path / "out.jsonl.run" / "manifest.json", rows, process)
        wait_for_bytes(tmp_path / "out.jsonl.run" / "rows.jsonl", rows, process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def rows_of(folder):
    return (folder / "out.jsonl.run/rows.jsonl").read_bytes().count(b"\n")


def goes_on(folder, resumed):
    assert start(folder).resumed == resumed
    start(folder, out=f"{folder}/calm.jsonl")
    assert (folder / "out.jsonl").read_bytes() == (folder / "calm.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_a_first_signal_finishes_what_is_in_flight(tmp_path, running, number, code):
    process = running(pause_s=0.3)  # on a busy machine, too, the signal comes before the last row
    process.send_signal(number)
    said = process.communicate(timeout=100)[1].decode().splitlines()
    assert process.returncode == code
    assert rows_of(tmp_path) == 4  # those that were admitted together, and no other
    assert said[-1] == (
        "dspark-batch: stopped; finished items are safe, run the same command to continue"
    )
    assert (
        "dspark-batch: stopping: what is in flight has 30 s to finish; again to stop at once"
        in said
    )
    goes_on(tmp_path, 4)


@pytest.mark.parametrize(
    ("words", "signals"),
    [
        *((["--grace=0.3"], [signal.SIGTERM]), (["--grace=0"], [signal.SIGTERM])),
        *(([], [signal.SIGTERM] * 2), ([], [signal.SIGINT] * 2)),
    ],
)
def test_what_does_not_finish_in_time_is_abandoned(tmp_path, running, words, signals):
    process = running(*words, pause_s=1.5)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    process.communicate(timeout=100)
    assert process.returncode == 128 + signals[0]
    assert rows_of(tmp_path) < 4  # those that were admitted together
    goes_on(tmp_path, rows_of(tmp_path))


def test_a_terminal_that_is_gone_stops_no_run(tmp_path, running):
    process = running(pause_s=0.02)
    process.stderr.close()  # whoever read it is dead: SIGPIPE
    assert process.wait(timeout=100) == 0
    process.stderr = None
    assert rows_of(tmp_path) == 12


def test_a_run_can_be_asked_to_stop_from_python(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts(*"abcdef"))
    seen = []
    with pytest.raises(Resumable, match="stopped as asked, 4 items are left"):
        start(tmp_path, observe=seen.append, is_asked=lambda: len(seen) > 3, slots=1)
    goes_on(tmp_path, 2)
