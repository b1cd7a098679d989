"""Conservation and flat memory at the size of a real job."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from million_driver import BAD_EVERY
from small_jobs import prompts, start, write_lines

DRIVER = Path(__file__).with_name("million_driver.py")


def figures_of(folder, records):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, DRIVER, folder, str(records)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def check_rows(path, records):
    """Every record has one row, in order, and the right one."""
    count = 0
    with path.open("rb") as file:
        for n, line in enumerate(file):
            row = json.loads(line)
            assert row["custom_id"] == str(n)
            assert (row["error"] is not None) == (n % BAD_EVERY == BAD_EVERY // 2)
            assert row["error"] or row["completion"] == f"question {n}\n"[-8:]
            count += 1
    assert count == records


@pytest.mark.slow
def test_a_million_lines_with_one_percent_bad_are_a_million_rows_in_flat_memory(tmp_path, capsys):
    small = figures_of(tmp_path / "small", 20_000)
    large = figures_of(tmp_path / "large", 1_000_000)
    again = figures_of(tmp_path / "large", 1_000_000)  # which finds every row there
    assert (large["rows"], large["errored"]) == (1_000_000, 10_000)
    check_rows(tmp_path / "large/out.jsonl", 1_000_000)
    with capsys.disabled():
        print(f"\n20,000 lines: {small}; 1,000,000 lines: {large}; once more: {again}")  # noqa: T201
    assert large["peak_mib"] < small["peak_mib"] + 40  # eight bytes a record, and slack
    assert again["peak_mib"] < small["peak_mib"] + 100  # sixty


@pytest.mark.slow
def test_a_line_of_200_megabytes_is_a_record_like_others(tmp_path):
    huge = {"id": "huge", "prompt": "p", "note": "x" * 200_000_000}
    write_lines(tmp_path / "in.jsonl", *prompts("a"), huge, *prompts("b"))
    report = start(tmp_path)
    assert (report.succeeded, report.errored) == (3, 0)
    assert (tmp_path / "out.jsonl").stat().st_size > 200_000_000
