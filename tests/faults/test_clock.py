"""A clock that jumps, or a machine that sleeps, changes nothing but the times in a report."""

import ast
import time
from pathlib import Path

from small_jobs import prompts, start, write_lines

PACKAGE = Path(__file__).parents[2] / "dspark_batch"


def test_no_module_of_a_run_asks_for_the_time_of_day():
    asks = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "time.time",
                "datetime.now",
            ):
                asks.add(path.relative_to(PACKAGE).as_posix())
    # A server tells its clients when things were made, and keeps the times that it promised.
    assert {name for name in asks if not name.startswith("serve/")} == {
        "record/run_dir.py",  # the manifest says when a job began
        "spec/budget.py",  # a deadline is a time of day; it is turned into seconds at the start
        "cli/run_command.py",  # the date in the names of a job file
        "run.py",  # the journal says when a row was finished, for report and status
        "output/status.py",  # how long ago that was
        "merge.py",  # the merged job says when it began
    }


def test_a_clock_that_jumps_by_a_day_changes_no_row(tmp_path, monkeypatch):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c"))
    start(tmp_path, out=f"{tmp_path}/calm.jsonl")
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(jumps) * 86_400.0)
    report = start(tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
    assert 0 <= report.decode_s < 60


def test_an_hour_of_sleep_between_two_rows_changes_no_row(tmp_path, monkeypatch):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c"))
    start(tmp_path, out=f"{tmp_path}/calm.jsonl")
    slept = [0.0]
    awake = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: awake() + slept[0])

    def sleep(tick):
        slept[0] += 3600 * (tick.done == 1)

    start(tmp_path, observe=sleep)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
