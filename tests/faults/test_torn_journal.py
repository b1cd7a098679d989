"""The Crash law: whatever a kill leaves, the same command ends with the same bytes."""

import json
import os
import shutil

import pytest
from fakes import FakeEngine, fake_opener, refuse_to_open
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.errors import JournalError


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A finished job of two answers and a bad record."""
    folder = tmp_path / "whole"
    folder.mkdir()
    monkeypatch.chdir(folder)  # short names, short journal
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # here a crash is a cut, not a lost write
    write_lines(folder / "in.jsonl", *prompts("a", "b"), b"nope")
    start(folder, inputs=("in.jsonl",), max_tokens=4)
    return folder


def crashed_copy(whole, journal: bytes):
    """The job as a kill leaves it: manifest and some bytes of the journal."""
    folder = whole.with_name("crashed")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out.jsonl.run").mkdir(parents=True)
    shutil.copy(whole / "out.jsonl.run/manifest.json", folder / "out.jsonl.run/manifest.json")
    (folder / "out.jsonl.run/rows.jsonl").write_bytes(journal)
    return folder


def resume(folder, **options):
    """Continue with more slots, so that new rows come in another order than the torn ones."""
    return start(folder, **{"inputs": ("in.jsonl",), "max_tokens": 4, "slots": 3} | options)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_crash_at_any_byte_loses_nothing_after_resume(whole, every):
    write_lines(whole / "in.jsonl", *prompts("a"), b"nope")  # few rows: every byte costs a run
    resume(whole, overwrite=True)
    journal = (whole / "out.jsonl.run/rows.jsonl").read_bytes()
    expected = (whole / "out.jsonl").read_bytes()
    ends = [at for at, byte in enumerate(journal) if byte == ord("\n")]
    near_ends = {at + n for at in ends for n in (-1, 0, 1, 2) if at + n <= len(journal)}
    for size in sorted({*range(0, len(journal) + 1, every), *near_ends}):
        folder = crashed_copy(whole, journal[:size])
        report = resume(folder, slots=2, fsync_every=9)
        assert (folder / "out.jsonl").read_bytes() == expected, f"crash after byte {size}"
        assert report.resumed == journal[:size].count(b"\n"), f"crash after byte {size}"


def test_two_crashes_in_a_row_lose_nothing(whole):
    journal = (whole / "out.jsonl.run/rows.jsonl").read_bytes()
    folder = crashed_copy(whole, journal[: len(journal) // 2])
    with pytest.raises(KeyboardInterrupt):
        resume(folder, engine=FakeEngine(slots=1, dies_after=1))
    torn = (folder / "out.jsonl.run/rows.jsonl").read_bytes()
    (folder / "out.jsonl.run/rows.jsonl").write_bytes(torn[:-7])
    resume(folder)
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"crc":"0000\0\0\0\0\n', b"{", b"\xff\xfe"])
def test_a_tail_of_rubbish_without_a_row_is_cut(whole, tail):
    journal = (whole / "out.jsonl.run/rows.jsonl").read_bytes()
    folder = crashed_copy(whole, journal + tail)
    report = resume(folder, opener=refuse_to_open)
    assert report.resumed == 3
    assert (folder / "out.jsonl.run/rows.jsonl").read_bytes() == journal


def test_a_flipped_bit_in_a_finished_row_is_refused(whole):
    journal = bytearray((whole / "out.jsonl.run/rows.jsonl").read_bytes())
    journal[journal.index(b"completion") + 14] ^= 1
    with pytest.raises(JournalError, match=r"rows.jsonl:1: not the row"):
        resume(crashed_copy(whole, bytes(journal)))


def lose(lines):
    return [lines[0], lines[2]]


def swap(lines):
    return [lines[1], lines[0], lines[2]]


def repeat(lines):
    return [lines[0], lines[0], *lines[1:]]


@pytest.mark.parametrize("change", [lose, swap, repeat])
def test_lines_that_are_lost_swapped_or_repeated_are_refused(whole, change):
    lines = (whole / "out.jsonl.run/rows.jsonl").read_bytes().splitlines(keepends=True)
    folder = crashed_copy(whole, b"".join(change(lines)))
    with pytest.raises(JournalError, match=r"rows.jsonl:[12]: not the row"):
        resume(folder)


@pytest.mark.parametrize(
    ("merged", "line"),
    [
        (lambda mine, its: [*mine[:2], its[2]], 3),
        (lambda mine, its: [*mine, *its], 4),
        (lambda mine, its: [*its, *mine], 1),
        (lambda mine, its: [mine[0], its[0], mine[1], its[1]], 2),
        (lambda mine, its: its, 1),
    ],
)
def test_two_journals_of_equal_jobs_that_are_merged_are_refused(whole, tmp_path, merged, line):
    twin = tmp_path / "twin"
    twin.mkdir()
    start(twin, inputs=("in.jsonl",), max_tokens=4)
    mine, its = (
        (folder / "out.jsonl.run/rows.jsonl").read_bytes().splitlines(keepends=True)
        for folder in (whole, twin)
    )
    folder = crashed_copy(whole, b"".join(merged(mine, its)))
    with pytest.raises(JournalError, match=rf"rows.jsonl:{line}: not the row"):
        resume(folder)


def test_the_message_about_damage_leads_to_a_run_that_works(whole):
    lines = (whole / "out.jsonl.run/rows.jsonl").read_bytes().splitlines(keepends=True)
    folder = crashed_copy(whole, b"".join([lines[0], lines[2]]))
    with pytest.raises(JournalError, match="delete this line and all below it"):
        resume(folder)
    (folder / "out.jsonl.run/rows.jsonl").write_bytes(lines[0])
    resume(folder)
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()


def test_rows_without_a_manifest_are_refused(whole):
    folder = crashed_copy(whole, (whole / "out.jsonl.run/rows.jsonl").read_bytes())
    (folder / "out.jsonl.run/manifest.json").unlink()
    with pytest.raises(JournalError, match=r"rows without their manifest.json"):
        resume(folder)


def test_a_damaged_manifest_is_refused(whole):
    folder = crashed_copy(whole, b"")
    (folder / "out.jsonl.run/manifest.json").write_bytes(b'{"version":')
    with pytest.raises(JournalError, match=r"manifest.json: damaged"):
        resume(folder)


def test_a_crash_before_the_manifest_starts_anew(whole):
    folder = crashed_copy(whole, b"")
    (folder / "out.jsonl.run/manifest.json").rename(folder / "out.jsonl.run/manifest.json.tmp")
    assert resume(folder).resumed == 0


def test_a_crash_while_the_output_is_written_repeats_only_the_writing(whole):
    folder = crashed_copy(whole, (whole / "out.jsonl.run/rows.jsonl").read_bytes())
    (folder / ".out.jsonl.tmp").write_bytes((whole / "out.jsonl").read_bytes()[:100])
    resume(folder, opener=refuse_to_open)
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert not (folder / ".out.jsonl.tmp").exists()


def test_a_crash_between_report_and_output_repeats_the_writing(whole):
    folder = crashed_copy(whole, (whole / "out.jsonl.run/rows.jsonl").read_bytes())
    shutil.copy(whole / "out.jsonl.run/report.json", folder / "out.jsonl.run/report.json")
    resume(folder, opener=refuse_to_open)
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()


def test_there_is_no_output_while_rows_are_missing(whole):
    write_lines(whole / "in.jsonl", *prompts("a", "b", "c"))
    seen = []

    def look(tick):
        seen.append((tick.stage, (whole / "out.jsonl").exists()))

    resume(whole, observe=look)
    assert {there for stage, there in seen if stage in ("decode", "finish")} == {False}
    assert (whole / "out.jsonl").exists()


def test_a_start_that_finds_another_model_touches_nothing(whole):
    write_lines(whole / "in.jsonl", *prompts("a", "b", "c"))
    before = (whole / "out.jsonl").read_bytes()
    with pytest.raises(Exception, match='target is "t0" there and "t1" here'):
        resume(whole, opener=fake_opener(target="t1"))
    assert (whole / "out.jsonl").read_bytes() == before


def test_the_manifest_is_written_before_the_first_row_and_never_again(whole):
    manifest = (whole / "out.jsonl.run/manifest.json").read_bytes()
    write_lines(whole / "in.jsonl", *prompts("a", "b", "c"))
    resume(whole)
    assert (whole / "out.jsonl.run/manifest.json").read_bytes() == manifest
    assert len(rows_in(whole / "out.jsonl")) == 3
    assert json.loads(manifest)["inputs"][0]["records"] == 3
