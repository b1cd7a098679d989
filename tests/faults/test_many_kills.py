"""SIGKILL at random moments of real runs, again and again until each run is done."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from statistics import mean

import pytest
from small_jobs import prompts, rows_in, write_lines

DRIVER = Path(__file__).with_name("kill_driver.py")
KILLS = 300
KILLS_OF_A_STAGE = 10
ONCE = ("import", "load", "admit", "finish")  # in a run
STAGES = (*ONCE, "prefill", "decode", "journal", "row")
WORDS = [f"{a} {b}" for a in ("one", "two", "three", "four") for b in ("red", "blue", "green")]


def spawn(folder, out, slots=3, *more):
    command = [sys.executable, DRIVER, folder / "in.jsonl", folder / out, str(slots), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0)


def answers(path):
    return [row | {"metrics": None} for row in rows_in(path)]


def poisoned_rows(path):
    return sum((row["error"] or {}).get("code") == "poison" for row in rows_in(path))


def time_stages(process):
    """Let a run end; return how long it and each of its stages took."""
    began = since = time.monotonic()
    stage, spans = "start", defaultdict(list)
    with process:
        for line in chain(process.stderr, [b"end"]):
            now = time.monotonic()
            spans[stage].append(now - since)
            stage, since = line.decode().strip(), now
    assert process.returncode == 1  # one record of the input is bad
    assert spans.keys() == {"start", *STAGES}
    return time.monotonic() - began, {stage: mean(took) for stage, took in spans.items()}


def moment(chance, whole_s, spans, kills):
    """Choose a stage, how often it has begun by then, and a delay; every other time any moment."""
    if chance.random() < 0.5:
        return "start", 0, chance.uniform(0, 1.1) * whole_s
    rarest = min(STAGES, key=lambda stage: kills[stage])
    times = 1 if rarest in ONCE else chance.randrange(1, 4)
    return rarest, times, chance.uniform(0, 1.1) * spans[rarest]


def killed(process, stage, times, delay):
    """Kill a process in a stage; return the last one it told, or None if it was done before."""
    told = []
    while told.count(stage) < times and (line := process.stderr.readline()):
        told.append(line.decode().strip())
    try:
        said = process.communicate(timeout=delay)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
    if process.returncode == 1:
        return None
    assert process.returncode == -signal.SIGKILL, (told, said)
    told += said.decode().splitlines()
    return next((line for line in reversed(told) if line in STAGES), "start")


@pytest.mark.slow
def test_300_kills_lose_no_row_and_double_none(tmp_path, capsys):
    chance = random.Random(2024)
    records = [*prompts(*WORDS), {"prompt": "no id"}, {"prompt": "none here"}]
    write_lines(tmp_path / "in.jsonl", *records, b"nope")
    began = time.monotonic()
    whole_s, spans = time_stages(spawn(tmp_path, "calm.jsonl"))
    expected = answers(tmp_path / "calm.jsonl")
    assert len(expected) == len(records) + 1

    kills, jobs, blamed = Counter(), 0, 0
    while kills.total() < KILLS:
        out = f"{jobs}.jsonl"
        while (
            stage := killed(
                spawn(tmp_path, out, chance.randrange(1, 5)),
                *moment(chance, whole_s, spans, kills),
            )
        ) is not None:
            kills[stage] += 1
        assert (tmp_path / f"{out}.run/rows.jsonl").read_bytes().count(b"\n") == len(expected)
        poisoned = poisoned_rows(tmp_path / out)
        if poisoned:  # three kills with one item alone in flight look as if it were to blame
            blamed += poisoned
            spawn(tmp_path, out, 3, "retry").communicate()
        assert answers(tmp_path / out) == expected, f"job {jobs} after {kills.total()} kills"
        jobs += 1
    assert min(kills[stage] for stage in STAGES) >= KILLS_OF_A_STAGE, kills
    with capsys.disabled():
        seconds = time.monotonic() - began
        print(f"\n{kills.total()} kills of {jobs} jobs, by last stage told: {dict(kills)}")  # noqa: T201
        rows = f"{jobs * len(expected)} rows, 0 lost, 0 doubled, {blamed} blamed"
        print(f"{rows}; a calm run took {whole_s:.1f} s, all {seconds:.0f} s")  # noqa: T201
