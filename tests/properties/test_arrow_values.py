"""No value of an Arrow table kills a job: rows = records, whatever is in the columns."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arrow_tables import random_table
from small_jobs import start

from dspark_batch.cli.main import main
from dspark_batch.intake.reader import Source, item_of, read
from dspark_batch.intake.values import values_of

SEEDS = range(24)  # every kind of file with every kind of job, twice


def stored(table, path):
    """Write the columns that the format has a place for; none at all: a job of prompts."""
    for name in table.schema.names:
        try:
            save(table.select(dict.fromkeys(("prompt", name))), path)
        except (pa.ArrowException, OSError):
            table = table.drop_columns(name)
    save(table, path)
    return table


def save(table, path):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def records_in(path):
    return [item_of(record).record for record in read([Source(path.name, path)])]


def column_in(path, name):
    return pq.ParquetFile(path).read().column(name).combine_chunks()


def check(folder: Path, seed: int) -> None:
    """Run a random table through everything that reads or writes rows."""
    form = "arrow" if seed % 4 == 3 else "parquet"
    source = folder / f"in.{form}"
    table = stored(random_table(seed), source)
    others = (
        (f"{folder}/out.jsonl", {}),
        (f"{folder}/dropped.parquet", {"drop": tuple(table.schema.names[1:])}),
        (f"{folder}/twice.parquet", {"samples": 2, "temperature": 1.0}),
    )
    jobs = [(f"{folder}/out.parquet", {}), others[seed % 3]]
    for out, options in jobs:
        report = start(folder, inputs=(str(source),), out=out, **options)
        assert report.total == table.num_rows * options.get("samples", 1)
        assert report.errored == 0 or not options.get("drop")
        assert len(records_in(Path(out))) == report.total
        assert main(["show", out, "-n", "20"]) == 0
        for to in ("parquet", "jsonl"):
            copy = folder / f"copy.{to}"
            assert main(["export", out, str(copy), "--overwrite"]) == 0
            assert len(records_in(copy)) == report.total
    if form == "parquet":
        check_columns(source, folder / "out.parquet", table.schema.names[1:])


def check_columns(source, out, names):
    """What an answered record had comes out as it went in; what could not be read is null."""
    answered = [row["error"] is None for row in records_in(out)]
    for name in names:
        after = column_in(out, name)  # by Arrow alone: others can read it, too
        try:
            before = column_in(source, name)
        except pa.ArrowInvalid:  # a dictionary with words that are no UTF-8, which Arrow refuses
            continue
        if after.type == before.type:  # else no place in Parquet: JSON text
            shown = [repr(values_of(each)) for each in (before, after)]
            if all(answered):
                assert shown[0] == shown[1]
            pairs = zip(values_of(before), values_of(after), answered, strict=True)
            assert all(repr(a) == repr(b) for a, b, is_answered in pairs if is_answered)
        else:
            assert pa.types.is_string(after.type)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_records_whatever_the_columns_hold(tmp_path, seed):
    check(tmp_path, seed)


@pytest.mark.slow
def test_rows_are_records_in_ten_thousand_tables(tmp_path):
    for seed in range(100, 10_100):
        folder = tmp_path / str(seed)
        folder.mkdir()
        check(folder, seed)
