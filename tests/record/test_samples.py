"""Several answers to each record: a row for each, beside each other."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FakeEngine, refuse_to_open
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.intake.reader import locate
from dspark_batch.record.journal import Journal
from dspark_batch.record.survey import most_bytes, survey
from dspark_batch.spec.spec import Spec

RECORDS = [*prompts("a", "b"), b"nope", {"prompt": "c", "x": [1]}]


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *RECORDS)
    return tmp_path


def names_in(path):
    return [(row["custom_id"], row["sample_index"], row["status"]) for row in rows_in(path)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_record_has_that_many_rows_in_input_order(folder, suffix):
    out = folder / f"out.{suffix}"
    report = start(folder, out=str(out), samples=2, slots=3)
    assert names_in(out) == [
        ("id-a", 0, "succeeded"),
        ("id-a", 1, "succeeded"),
        ("id-b", 0, "succeeded"),
        ("id-b", 1, "succeeded"),
        ("#2", 0, "errored"),
        ("#2", 1, "errored"),
        ("#3", 0, "succeeded"),
        ("#3", 1, "succeeded"),
    ]
    assert [row.get("prompt") for row in rows_in(out)] == [*"aabb", None, None, *"cc"]
    assert (report.total, report.samples, report.exit_code) == (8, 2, 1)


def test_a_parquet_input_keeps_its_types(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "n": pa.array([1, None], pa.uint8())})
    pq.write_table(table, tmp_path / "in.parquet")
    out = str(tmp_path / "out.parquet")
    start(tmp_path, inputs=(str(tmp_path / "in.parquet"),), out=out, samples=3)
    rows = pq.read_table(out)
    assert rows.schema.field("n").type == pa.uint8()
    assert rows["n"].to_pylist() == [1, 1, 1, None, None, None]
    assert rows["sample_index"].to_pylist() == [0, 1, 2, 0, 1, 2]


def test_a_stopped_job_goes_on_with_the_samples_that_are_left(folder):
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=3), samples=2)
    ran = []
    start(
        folder,
        samples=2,
        observe=lambda t: t.outcome and ran.append(t.outcome.item),
    )
    names = [(item.custom_id, item.sample_index) for item in ran]
    assert names == [("id-b", 1), ("#2", 0), ("#2", 1), ("#3", 0), ("#3", 1)]


def test_more_samples_keep_those_that_are_there(folder):
    start(folder, samples=2)
    before = rows_in(folder / "out.jsonl")
    report = start(folder, samples=3)
    after = rows_in(folder / "out.jsonl")
    good = [row for row in before if row["status"] == "succeeded"]
    assert report.resumed == len(good)
    assert [row for row in after if row["sample_index"] < 2 and row in good] == good
    assert len(after) == 12


def test_the_limit_counts_records(folder):
    start(folder, samples=2, limit=1)
    assert len(rows_in(folder / "out.jsonl")) == 2


def test_as_many_rows_of_other_records_are_no_finished_job(folder):
    write_lines(folder / "in.jsonl", *prompts(*"abcd"))
    start(folder, samples=2, limit=2)
    start(folder, samples=1, limit=4)
    assert [row["custom_id"] for row in rows_in(folder / "out.jsonl")] == [
        *("id-a", "id-b", "id-c", "id-d")
    ]


def test_a_finished_job_with_samples_has_nothing_to_do(folder):
    start(folder, samples=2)
    assert start(folder, samples=2, opener=refuse_to_open).total == 8


def test_samples_without_chance_are_warned_of(folder, caplog):
    start(folder, samples=2, temperature=0.5)
    assert not caplog.records
    start(folder, samples=2, overwrite=True)
    assert "samples is 2 at temperature 0" in caplog.text


def test_space_is_asked_for_every_row_of_a_record(folder):
    sources = locate([str(folder / "in.jsonl")], folder / "stdin")
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", samples=3)
    with Journal(folder / "rows.jsonl", "seed") as journal:
        three = most_bytes(survey(sources, spec, journal), spec)
    with Journal(folder / "rows.jsonl", "seed") as journal:
        one = most_bytes(
            survey(sources, replace(spec, samples=1), journal), replace(spec, samples=1)
        )
    assert three == 3 * one
