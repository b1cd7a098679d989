"""What a fleet's start keeps of the items that were in flight in workers that died."""

import pytest

from dspark_batch.record.attempts import Attempts, Lesson, Suspect, lesson
from dspark_batch.types import Item

ITEMS = [Item(n, f"q{n}", f"digest-{n}", f"in.jsonl:{n}") for n in range(6)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "attempts.jsonl"


def start(path, *losses, admitted=(), is_fleet=True, ends=False, is_to_do=lambda index: True):
    """One start; it crashes unless it ends."""
    learnt = lesson(path, 0, is_to_do)
    attempts = Attempts(path, 0, learnt, is_fleet=is_fleet)
    for index in admitted:
        attempts.admit(ITEMS[index])
    for lost in losses:
        attempts.lose("host:0", [ITEMS[index] for index in lost])
    if ends:
        attempts.__exit__(None, None, None)
    return lesson(path, 0, is_to_do)


def suspect(index, crashes=0):
    return Suspect(index, f"digest-{index}", crashes)


def test_a_driver_that_crashed_blames_no_item_of_its_workers(path):
    assert start(path, admitted=(0, 1, 2)) == Lesson()


@pytest.mark.parametrize("ends", [False, True])
def test_who_was_in_flight_in_two_workers_that_died_is_kept_apart_by_the_next_start(path, ends):
    assert start(path, (0, 1, 2), (2, 3), ends=ends).suspects == (suspect(2),)


def test_one_death_makes_nobody_a_suspect(path):
    assert start(path, (0, 1), (2, 3), (4,)).suspects == ()


def test_deaths_with_an_item_alone_add_up_over_starts(path):
    assert start(path, (0, 1), (0,)).suspects == (suspect(0, 1),)
    assert start(path).suspects == (suspect(0, 1),)
    assert start(path, (0,), (0,)).suspects == (suspect(0, 3),)


def test_a_suspect_that_has_its_row_is_none(path):
    assert start(path, (0, 1), (0, 1)).suspects == (suspect(0), suspect(1))
    assert lesson(path, 0, lambda index: index != 0).suspects == (suspect(1),)


def test_one_process_learns_from_a_fleet(path):
    start(path, (0, 1), (0,))
    assert start(path, admitted=(0,), is_fleet=False).suspects == (suspect(0, 2),)
