"""Where a job stands, without disturbing it."""

import json

import pytest
from fakes import FakeEngine
from small_jobs import planned, prompts, start, write_lines

from dspark_batch.cli.main import main
from dspark_batch.errors import UsageError
from dspark_batch.output.status import status
from dspark_batch.record.run_dir import RunDir


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c", "d"))
    return tmp_path


def look_at(folder, **options):
    return status(str(folder / "out.jsonl"), **options)


def stop_after(folder, rows, **options):
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=rows), **options)


def test_a_finished_job_is_finished(folder):
    start(folder)
    found = look_at(folder)
    assert (found.state, found.holder, found.done, found.total) == ("finished", None, 4, 4)
    assert found.accept_length == start(folder).mean_acceptance_length
    assert found.remaining_s is None


def test_a_stopped_job_says_how_far_it_came(folder):
    stop_after(folder, 3)
    found = look_at(folder)
    assert (found.state, found.done, found.total, found.starts) == ("stopped", 3, 4, 1)


def test_a_running_job_says_who_how_fast_and_how_long(folder):
    seen = []

    def watch(tick):
        if tick.done == 2 and tick.outcome:
            began = RunDir(str(folder / "out.jsonl")).starts()[-1].began
            seen.append(look_at(folder, now=began + 20))

    start(folder, engine=FakeEngine(slots=1), observe=watch)
    [found] = seen
    assert found.state == "running"
    assert found.holder.startswith("process ")
    assert (found.done, found.total) == (2, 4)
    assert found.remaining_s == pytest.approx(20)  # two rows took 20 s, two are left
    assert found.tokens_per_s == pytest.approx(found.new_tokens / 20)
    assert found.recent_tokens_per_s == found.tokens_per_s


def test_rows_of_earlier_starts_are_no_speed(folder):
    stop_after(folder, 3)
    seen = []

    def watch(tick):
        if tick.stage == "decode" and tick.outcome is None:
            seen.append(look_at(folder))

    start(folder, observe=watch)
    [found] = seen
    assert (found.done, found.new_tokens, found.tokens_per_s) == (3, 0, None)
    assert found.remaining_s is None


def test_a_row_that_was_tried_again_counts_once(folder):
    start(folder, engine=FakeEngine(fails_on=frozenset({"id-b"})))
    assert look_at(folder).failed == 1
    start(folder, retry_failed=True)
    found = look_at(folder)
    assert (found.done, found.failed) == (4, 0)


def test_looking_changes_no_byte_of_the_run_directory(folder):
    stop_after(folder, 2)
    rows = folder / "out.jsonl.run" / "rows.jsonl"
    rows.write_bytes(rows.read_bytes() + b'{"crc":"torn')
    files = {path: path.read_bytes() for path in rows.parent.iterdir()}
    assert look_at(folder).done == 2
    assert {path: path.read_bytes() for path in rows.parent.iterdir()} == files


def test_the_plan_of_a_job_is_told(folder, capsys):
    start(folder, opener=planned())
    assert look_at(folder).plan["why"] == "because"
    assert main(["status", str(folder / "out.jsonl")]) == 0
    assert (
        "plan          float32, slots 4, draft length 7 at most; because" in capsys.readouterr().out
    )


def test_no_job_is_no_status(folder):
    with pytest.raises(UsageError, match="no job here"):
        look_at(folder)


def test_the_command_says_it_in_words_and_in_json(folder, capsys):
    stop_after(folder, 3)
    out = str(folder / "out.jsonl")
    assert main(["status", out]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out} was stopped; its command continues it.\n")
    assert "3 of 4" in said
    assert main(["status", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 3
