"""SIGKILL at random moments of real runs, again and again until each run is done."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from small_jobs import prompts, rows_in, write_lines

DRIVER = Path(__file__).with_name("kill_driver.py")
KILLS = 300
WORDS = [f"{a} {b}" for a in ("one", "two", "three", "four") for b in ("red", "blue", "green")]


def spawn(folder, out, slots=3, *more):
    command = [sys.executable, DRIVER, folder / "in.jsonl", folder / out, str(slots), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def answers(path):
    return [row | {"metrics": None} for row in rows_in(path)]


def poisoned_rows(path):
    return sum((row["error"] or {}).get("code") == "poison" for row in rows_in(path))


def killed_after(process, delay):
    """Kill a process after a time; return the last stage it told, or None if it was done."""
    try:
        said = process.communicate(timeout=delay)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
    if process.returncode == 1:  # finished: one record of the input is bad
        return None
    assert process.returncode == -signal.SIGKILL, said
    return (said.decode().split() or ["start"])[-1]


@pytest.mark.slow
def test_300_kills_lose_no_row_and_double_none(tmp_path, capsys):
    chance = random.Random(2024)
    records = [*prompts(*WORDS), {"prompt": "no id"}, {"prompt": "none here"}]
    write_lines(tmp_path / "in.jsonl", *records, b"nope")
    began = time.monotonic()
    assert spawn(tmp_path, "calm.jsonl").communicate()[1].split()[-1] == b"finish"
    whole_s = time.monotonic() - began
    expected = answers(tmp_path / "calm.jsonl")
    assert len(expected) == len(records) + 1

    stages, jobs, blamed = Counter(), 0, 0
    while stages.total() < KILLS:
        out = f"{jobs}.jsonl"
        while (
            stage := killed_after(
                spawn(tmp_path, out, chance.randrange(1, 5)), chance.uniform(0, 1.1) * whole_s
            )
        ) is not None:
            stages[stage] += 1
        assert (tmp_path / f"{out}.run/rows.jsonl").read_bytes().count(b"\n") == len(expected)
        poisoned = poisoned_rows(tmp_path / out)
        if poisoned:  # three kills with one item alone in flight look as if it were to blame
            blamed += poisoned
            spawn(tmp_path, out, 3, "retry").communicate()
        assert answers(tmp_path / out) == expected, f"job {jobs} after {stages.total()} kills"
        jobs += 1
    with capsys.disabled():
        kills = f"{stages.total()} kills of {jobs} jobs, by last stage told: {dict(stages)}"
        print(f"\n{kills}; {jobs * len(expected)} rows, 0 lost, 0 doubled, {blamed} blamed")  # noqa: T201
