import os

import pytest

from dspark_batch.errors import JournalError
from dspark_batch.record.journal import Entry, Journal, scan
from dspark_batch.types import Item


def entry(index, digest="d", status="succeeded", **row):
    identity = {"custom_id": "same name", "sample_index": 0}
    return Entry(index, f"in.jsonl:{index + 1}", digest, identity | row | {"status": status})


def item(index, digest="d", where=None, custom_id="same name"):
    return Item(index, custom_id, digest, where or f"in.jsonl:{index + 1}")


@pytest.fixture
def journal_of(tmp_path):
    """Write entries, and open the journal again as the next start does."""
    opened = []

    def reopened(*entries):
        path = tmp_path / "rows.jsonl"
        with Journal(path, "seed") as journal:
            for one in entries:
                journal.append(one)
        opened.append(Journal(path, "seed"))
        return opened[-1]

    yield reopened
    for journal in opened:
        journal.close()


def never(row):
    return False


def claimed(journal, one, retries=never):
    found = journal.claim(one, retries)
    return None if found is None else journal.read(found.offset)


def test_what_is_appended_can_be_read_at_its_offset(tmp_path):
    with Journal(tmp_path / "rows.jsonl", "seed") as journal:
        offsets = [journal.append(entry(n, text="é\n" * n)) for n in range(5)]
        assert [journal.read(offset) for offset in reversed(offsets)] == [
            entry(n, text="é\n" * n) for n in reversed(range(5))
        ]


@pytest.mark.parametrize(("every", "lines_safe"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5])])
def test_rows_are_on_the_disk_after_every_so_many_and_at_the_end(
    tmp_path, monkeypatch, every, lines_safe
):
    path = tmp_path / "rows.jsonl"
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(path.read_bytes().count(b"\n")))
    with Journal(path, "seed", fsync_every=every) as journal:
        for n in range(5):
            journal.append(entry(n))
    assert seen == lines_safe


def test_the_next_start_finds_every_row(journal_of):
    journal = journal_of(entry(0, "a"), entry(1, "b"))
    assert claimed(journal, item(0, "a")) == entry(0, "a")
    assert claimed(journal, item(1, "b")) == entry(1, "b")


def test_a_row_is_claimed_once(journal_of):
    journal = journal_of(entry(0))
    assert claimed(journal, item(0))
    assert claimed(journal, item(0)) is None


def test_position_alone_never_matches(journal_of):
    assert claimed(journal_of(entry(0, "a")), item(0, "b")) is None


def test_a_record_that_moved_keeps_its_row(journal_of):
    assert claimed(journal_of(entry(0, "a")), item(7, "a")) == entry(0, "a")


def test_a_record_under_another_name_is_another_item(journal_of):
    assert claimed(journal_of(entry(0)), item(0, custom_id="new name")) is None


def test_equal_records_each_take_a_row_of_their_own(journal_of):
    journal = journal_of(entry(0, n=1), entry(1, n=2))
    assert claimed(journal, item(1)) == entry(1, n=2)  # its own, before any other
    assert claimed(journal, item(2)) == entry(0, n=1)
    assert claimed(journal, item(3)) is None


def test_another_sample_of_the_same_record_is_another_item(journal_of):
    journal = journal_of(entry(0))
    other = Item(0, "same name", "d", "in.jsonl:1", {}, sample_index=1)
    assert claimed(journal, other) is None


def test_a_failure_stays_in_its_place_only(journal_of):
    failed = entry(0, status="errored")
    assert claimed(journal_of(failed), item(0)) == failed
    assert claimed(journal_of(failed), item(0, where="in.jsonl:9")) is None
    assert claimed(journal_of(failed), item(1)) is None


def test_a_failure_can_be_asked_to_run_again(journal_of):
    seen = []
    assert claimed(journal_of(entry(0, status="errored")), item(0), lambda row: True) is None
    assert claimed(journal_of(entry(0)), item(0), seen.append) == entry(0)
    assert not seen  # an answer is never asked about


def test_the_last_row_of_an_item_wins(journal_of):
    assert claimed(journal_of(entry(0, status="errored"), entry(0, n=2)), item(0)) == entry(0, n=2)


def test_every_prefix_of_a_journal_is_a_journal(tmp_path, journal_of):
    journal_of(*(entry(n, str(n)) for n in range(3)))
    whole = (tmp_path / "rows.jsonl").read_bytes()
    for size in range(len(whole) + 1):
        path = tmp_path / "prefix.jsonl"
        path.write_bytes(whole[:size])
        with Journal(path, "seed") as journal:
            kept = [n for n in range(3) if journal.claim(item(n, str(n)), never)]
            journal.append(entry(9))
        assert kept == list(range(whole[:size].count(b"\n"))), f"cut at {size}"
        with path.open("rb") as stream:
            assert len([*scan(stream, "seed", "prefix")]) == len(kept) + 1, f"cut at {size}"


def test_a_flipped_bit_in_a_finished_row_is_refused_by_line_number(tmp_path, journal_of):
    journal_of(*(entry(n, str(n), text="é") for n in range(3)))
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    for position in range(len(whole) - 1):  # without the last newline the tail is torn
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        line = whole[:position].count(b"\n") + 1
        with pytest.raises(JournalError, match=f"rows.jsonl:{line}: not the row"):
            Journal(path, "seed")


def test_a_journal_of_another_run_is_refused(tmp_path, journal_of):
    journal_of(entry(0))
    with pytest.raises(JournalError, match=r"rows.jsonl:1: not the row that this run wrote here"):
        Journal(tmp_path / "rows.jsonl", "another seed")


def test_a_refused_journal_is_left_as_it_is(tmp_path, journal_of):
    journal_of(entry(0), entry(1))
    path = tmp_path / "rows.jsonl"
    damaged = path.read_bytes().replace(b'"index":0', b'"index":5') + b"torn"
    path.write_bytes(damaged)
    with pytest.raises(JournalError):
        Journal(path, "seed")
    assert path.read_bytes() == damaged


def test_nul_bytes_before_the_end_are_no_torn_tail(tmp_path, journal_of):
    journal_of(entry(0), entry(1))
    path = tmp_path / "rows.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first.replace(b"in.jsonl", bytes(8)) + second)
    with pytest.raises(JournalError, match=r"rows.jsonl:1"):
        Journal(path, "seed")


def test_one_who_only_reads_changes_nothing_and_sees_all_whole_lines(tmp_path, journal_of):
    journal_of(entry(0, "a"), entry(1, "b"))
    path = tmp_path / "rows.jsonl"
    half = path.read_bytes() + b'{"crc":"another process is wri'
    path.write_bytes(half)
    with Journal(path, "seed", read_only=True) as journal:
        assert claimed(journal, item(0, "a")) == entry(0, "a")
        assert claimed(journal, item(1, "b")) == entry(1, "b")
    assert path.read_bytes() == half


def test_one_who_only_reads_creates_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "rows.jsonl", "seed", read_only=True)
    assert not list(tmp_path.iterdir())
