"""A start ends in time by beginning no item that would end too late."""

import time
from datetime import datetime
from types import SimpleNamespace

import pytest
from fakes import FakeEngine
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.errors import Resumable, UsageError
from dspark_batch.spec.budget import Budget, seconds_of, seconds_until
from dspark_batch.types import Completion, Failure, Item

ITEM = Item(0, "0", "00", "in.jsonl:1")


@pytest.fixture
def clock():
    return SimpleNamespace(now=1000.0)


@pytest.fixture
def budget(clock):
    """Ten seconds from now on."""
    return Budget(None, "10s", clock=lambda: clock.now)


@pytest.fixture
def berlin(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def took(seconds):
    return Completion(ITEM, "", (1,), "stop", 1, prefill_s=seconds / 4, decode_s=seconds * 3 / 4)


def test_without_a_limit_time_is_never_up():
    assert Budget(None, None, clock=lambda: 1e12).allows_one_more()


def test_an_item_begins_only_if_a_recent_one_would_end_in_time(budget, clock):
    budget.add(took(4))
    clock.now += 5.9
    assert budget.allows_one_more()
    clock.now += 0.1
    assert not budget.allows_one_more()


def test_the_longest_recent_item_counts_and_a_failure_does_not(budget, clock):
    for seconds in (1, 4, 2):
        budget.add(took(seconds))
    budget.add(Failure(ITEM, "engine", "not finite"))
    clock.now += 6.5
    assert not budget.allows_one_more()


def test_an_item_takes_as_long_as_all_its_turns(budget, clock):
    budget.add(took(2)._replace(earlier=(took(1), took(1))))
    clock.now += 5.9
    assert budget.allows_one_more()
    clock.now += 0.1
    assert not budget.allows_one_more()


def test_an_item_of_long_ago_does_not_count(budget, clock):
    for seconds in (9, *[1] * 32):
        budget.add(took(seconds))
    clock.now += 6.5
    assert budget.allows_one_more()


def test_once_the_time_is_up_it_stays_so(budget, clock):
    budget.add(took(8))
    clock.now += 5
    assert not budget.allows_one_more()
    for _ in range(32):
        budget.add(took(1))
    assert not budget.allows_one_more()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6h", 21600), ("1h30m", 5400), ("90s", 90), ("2h5s", 7205), ("7d", 604800)],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "6", "6 h", "h", "0h", "-1h", "1.5h", "30m1h", "0d", "9" * 5000 + "h"]
)
def test_refuses_what_is_no_duration(text):
    with pytest.raises(UsageError, match="max_runtime is "):
        seconds_of(text)


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("now", "deadline", "hours"),
    [
        ("2025-01-10 23:00", "07:00", 8),
        ("2025-01-10 06:00", "7:00", 1),
        ("2025-01-10 07:00", "07:00", 24),
        ("2025-12-31 23:30", "00:00", 0.5),
        ("2025-03-29 23:00", "07:00", 7),  # clocks go forward
        ("2025-10-25 23:00", "07:00", 9),  # clocks go back
    ],
)
def test_a_deadline_is_the_next_such_time_on_local_clocks(now, deadline, hours):
    then = datetime.fromisoformat(now).timestamp()
    assert seconds_until(deadline, then) == hours * 3600


@pytest.mark.parametrize("text", ["24:00", "7", "07:60", "7am", "", "07:00:00"])
def test_refuses_what_is_no_time_of_the_day(text):
    with pytest.raises(UsageError, match="deadline is "):
        seconds_until(text, 0.0)


def test_the_earlier_of_two_limits_counts(clock):
    both = Budget("00:00", "10s", now=0.0, clock=lambda: clock.now)
    clock.now += 11
    assert not both.allows_one_more()


def test_a_run_out_of_time_is_resumable_and_goes_on_where_it_stopped(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c"))
    # An item of the fake says that it took 0.75 s, and 0.3 s have passed after the first.
    with pytest.raises(Resumable) as error:
        start(tmp_path, engine=FakeEngine(slots=1, pause_s=0.3), max_runtime="1s")
    assert error.value.exit_code == 75
    assert "the time is up with 1 of 3 rows finished" in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()
    report = start(tmp_path)  # another budget is the same job
    assert (report.resumed, len(rows_in(tmp_path / "out.jsonl"))) == (1, 3)


def test_what_is_in_flight_is_finished_when_the_time_is_up(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c", "d", "e"))
    with pytest.raises(Resumable, match="3 of 5 rows"):
        start(tmp_path, engine=FakeEngine(slots=3, pause_s=0.15), max_runtime="1s")
