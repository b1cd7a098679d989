"""The corpus: many kinds, right answers, two sides that never mix."""

import contextlib
import csv
import io
import json
import re
from datetime import date, timedelta
from itertools import islice
from random import Random

import pytest

from recipes.tiny.corpus import conversations, draw_turn, held_out_turns, is_held_out
from recipes.tiny.tasks import KINDS
from recipes.tiny.tasks.time import MONTHS, WEEKDAYS


def _tasks(kind, count=60):
    rng = Random(f"test/{kind}")
    return [KINDS[kind](rng) for _ in range(count)]


def _numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def _last_line(task):
    return task.answer.splitlines()[-1]


def test_there_are_at_least_twelve_kinds_with_and_without_one_right_answer():
    exact = {kind: _tasks(kind, 1)[0].exact for kind in KINDS}
    assert sum(exact.values()) >= 12
    assert not all(exact.values())


def test_the_seed_decides_everything():
    assert list(islice(conversations("a"), 50)) == list(islice(conversations("a"), 50))
    assert list(islice(conversations("a"), 50)) != list(islice(conversations("b"), 50))


def test_a_held_out_task_never_occurs_in_training():
    held_out = {(turn.kind, turn.task.content) for turn in held_out_turns("test", 40)}
    drawn = [turn for each in islice(conversations("test"), 16_000) for turn in each.turns]
    trained = {(turn.kind, turn.task.content) for turn in drawn}
    assert len(drawn) > 19_000
    assert not held_out & trained
    assert not any(is_held_out(kind, content) for kind, content in trained)


def test_swapped_summands_are_the_same_task():
    by_content = {}
    for task in _tasks("add", 300):
        by_content.setdefault(task.content, set()).add(task.answer.splitlines()[-1])
    assert all("+" in content for content in by_content)
    a, b = _numbers(_tasks("add", 1)[0].prompt)
    assert _tasks("add", 1)[0].content == f"{min(a, b)}+{max(a, b)}"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_has_both_sides(kind):
    for side in (True, False):
        turn = draw_turn(Random(1), kind, held_out=side)
        assert is_held_out(kind, turn.task.content) == side


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("add", lambda a, b: a + b),
        ("subtract", lambda a, b: abs(a - b)),
        ("multiply", lambda a, b: a * b),
    ],
)
def test_results_are_right(kind, rule):
    for task in _tasks(kind):
        assert _last_line(task) == f"Result: {rule(*_numbers(task.prompt))}"


def test_sorted_lists_are_sorted():
    for task in _tasks("sort"):
        falling = "descending" in task.prompt
        assert _numbers(_last_line(task)) == sorted(_numbers(task.prompt), reverse=falling)


def test_weekdays_and_dates_agree_with_the_calendar():
    monday = date(2024, 1, 1)
    for task in _tasks("weekday"):
        day = next(name for name in WEEKDAYS if name in task.prompt)
        days = _numbers(task.prompt)[0] * (-1 if "before" in task.prompt else 1)
        there = monday + timedelta(days=WEEKDAYS.index(day) + days)
        assert _last_line(task) == f"Answer: {WEEKDAYS[there.weekday()]}"
    for task in _tasks("date"):
        days, day, month = re.search(r"(\d+) days after (\d+) (\w+)", task.prompt).groups()
        number = [name for name, _ in MONTHS].index(month) + 1
        there = date(2023, number, int(day)) + timedelta(days=int(days))
        assert _last_line(task) == f"Answer: {there.day} {MONTHS[there.month - 1][0]}"


def test_clock_times_are_right():
    for task in _tasks("clock"):
        start = re.search(r"(\d\d):(\d\d)", task.prompt)
        hours, minutes = re.search(r"(\d+) hours and (\d+) minutes", task.prompt).groups()
        total = int(start[1]) * 60 + int(start[2]) + int(hours) * 60 + int(minutes)
        assert _last_line(task) == f"Answer: {total // 60 % 24:02}:{total % 60:02}"


def test_letters_are_reversed_and_counted():
    for task in _tasks("reverse"):
        word = re.search(r'"(\w+)"', task.prompt)[1]
        assert _last_line(task).split(": ")[1].split() == list(reversed(word))
    for task in _tasks("count_letter"):
        letter, word = re.findall(r'"(\w+)"', task.prompt)
        assert _last_line(task) == f'The letter "{letter}" occurs {word.count(letter)} times.'


def test_json_says_what_the_prompt_says():
    for task in _tasks("csv_to_json"):
        table = task.prompt[task.prompt.index("name,age,city") :]
        rows = list(csv.DictReader(io.StringIO(table)))
        found = json.loads(task.answer.removeprefix("```json\n").removesuffix("\n```"))
        assert [{**row, "age": int(row["age"])} for row in rows] == found
    for kind in ("json_person", "json_order"):
        for task in _tasks(kind):
            found = json.loads(task.answer.removeprefix("```json\n").removesuffix("\n```"))
            assert all(str(value) in task.prompt for value in found.values())


def test_functions_print_what_they_promise():
    for task in _tasks("python_function", 200):
        code = task.answer.split("```python\n")[1].removesuffix("\n```")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code, {})
        assert said.getvalue().strip() == code.rsplit("# ", 1)[1]


def test_totals_and_conversions_are_right():
    for task in _tasks("shopping"):
        pairs = re.findall(r"(\d+) \w+ at (\d+) euros", task.prompt)
        total = sum(int(count) * int(price) for count, price in pairs)
        assert _last_line(task).endswith(f"pays {total} euros.")
    for task in _tasks("convert"):
        factor, value = _numbers(task.answer.splitlines()[0])[0], _numbers(task.prompt)[0]
        assert _numbers(_last_line(task)) == [factor * value]


def test_table_answers_stand_in_their_row():
    for task in _tasks("table"):
        item = re.search(r"of the (\w+)", task.prompt)[1]
        row = next(line for line in task.prompt.splitlines() if line.startswith(f"| {item} |"))
        value = _last_line(task).rsplit(" is ", 1)[1].removesuffix(".")
        assert value in row.split()
        assert row in task.answer
