"""Write the output: every row, in input order, or no file at all."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.errors import Resumable
from dspark_batch.intake.json_text import dump
from dspark_batch.intake.reader import Chunk, Source, item_of, printable, read, read_chunks
from dspark_batch.output.columns import (
    MISFITS,
    ColumnTypes,
    Misfit,
    column_types,
    input_columns,
    write_batch,
)
from dspark_batch.output.parsed import AS_TEXT, Column, column_of
from dspark_batch.output.plan import plan_of
from dspark_batch.output.regenerate import written_back
from dspark_batch.output.report import Report
from dspark_batch.output.responses import response_line
from dspark_batch.record.disk import full_disk_is_resumable, sync_file
from dspark_batch.record.formats import InputJson, Manifest
from dspark_batch.record.journal import Entry, Journal
from dspark_batch.record.rows import PARSED, ROW_SCHEMA, Row, columns_of, layout_of, parsed_in
from dspark_batch.record.run_dir import RunDir
from dspark_batch.record.survey import TO_DO, Survey
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Failure, Item, Json, SetupJson

Line: TypeAlias = Mapping[str, Json]
Joined: TypeAlias = Iterator[tuple[Chunk, list[Row]]]


class Rows:
    """The rows of a job, beside the records they answer; can be walked many times.

    A record that has no row yet is left out; a complete job has none.
    """

    def __init__(self, sources: Sequence[Source], journal: Journal, found: Survey) -> None:
        """Join by position what was found to match."""
        self._sources, self._journal, self._found = sources, journal, found

    @property
    def inputs(self) -> Sequence[InputJson]:
        """The files that the records came from."""
        return self._found.inputs

    def __len__(self) -> int:
        return self._found.total - self._found.num_to_do

    def __iter__(self) -> Iterator[Row]:
        return (entry.row for entry in self.entries())

    def entries(self) -> Iterator[Entry]:
        """Yield the lines of the journal, without reading a record again."""
        return (self._journal.read(offset) for offset in self._found.offsets if offset != TO_DO)

    def records(self) -> Iterator[Item | Failure]:
        """Read all records again, also those without a row."""
        return read(self._sources, self._found.part, self._found.samples)

    def chunks(self) -> Iterator[Chunk]:
        """Read the records again."""
        found = self._found
        for chunk in read_chunks(self._sources, found.part, found.samples):
            yield chunk.only([not found.is_to_do(item_of(r).index) for r in chunk.records])

    def answered(self) -> Iterator[tuple[Item, Entry]]:
        """Yield each item that has a row with its line of the journal."""
        return ((item_of(record), entry) for record, entry in self.recorded())

    def recorded(self) -> Iterator[tuple[Item | Failure, Entry]]:
        """Yield each record that has a row with its line of the journal."""
        for chunk in self.chunks():
            for record in chunk.records:
                yield record, self._entry(item_of(record))

    def at(self, index: int) -> Entry:
        """Read the row of the item with an index that `answered` gave."""
        return self._journal.read(self._found.offset_of(index))

    def joined(self) -> Joined:
        """Yield each chunk of records with its rows."""
        for chunk in self.chunks():
            yield chunk, [self._row(record) for record in chunk.records]

    def _row(self, record: Item | Failure) -> Row:
        return self._entry(item_of(record)).row

    def _entry(self, item: Item) -> Entry:
        entry = self.at(item.index)
        if entry.digest != item.digest:
            raise changed_input(item.where)
        return entry


def changed_input(where: str) -> Resumable:
    """Say that a record is no longer what this start has read before."""
    return Resumable(
        f"{where}: the input changed while the job ran. The finished rows are safe; run the same "
        "command again."
    )


def finish(
    run_dir: RunDir,
    manifest: Manifest,
    rows: Rows,
    spec: Spec,
    *,
    setup: SetupJson | None,
    **known: Any,
) -> Report:
    """Write the output and the report of a job, and make both appear.

    Args:
        run_dir: of the job.
        manifest: of the job.
        rows: all of them.
        spec: says what the output looks like.
        setup: with which the last start decoded; None: none did.
        known: what no row can tell, as `Report.of_rows` has it, but for `finish_s`.

    Raises:
        Resumable: the disk is full, or the input changed.
    """
    began = time.monotonic()
    draft = write_output(run_dir.out, rows, spec, datetime.fromisoformat(manifest["created"]))
    report = Report.of_rows(
        rows,
        out=printable(spec.out),
        samples=spec.samples,
        plan=plan_of(setup) if setup else None,
        finish_s=time.monotonic() - began,
        **known,
    )
    run_dir.publish(draft, report.to_json(), rows.inputs)
    return report


def write_output(out: Path, rows: Rows, spec: Spec, begun: datetime) -> Path:
    """Write all rows beside `out`, synced to disk, and return that file.

    Args:
        out: the name of the output.
        rows: of the whole job.
        spec: says what the output looks like.
        begun: when the job began.

    Raises:
        Resumable: the disk is full, or the input changed.
    """
    draft = out.with_name(f".{out.name}.tmp")
    try:
        with full_disk_is_resumable(out):
            written = _write(draft, rows, spec, begun)
            sync_file(draft)
        if written != len(rows):
            raise changed_input(str(out))
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft


def _write(path: Path, rows: Rows, spec: Spec, begun: datetime) -> int:
    if spec.out.endswith(".parquet"):
        return _write_parquet(path, rows, spec)
    return _write_jsonl(path, rows, line_maker(spec, begun))


def line_maker(spec: Spec, begun: datetime) -> Callable[[Item, Row], Line]:
    """Make the function that joins an item and its row to a line of the output.

    Args:
        spec: says what the output looks like.
        begun: when the job began.
    """
    if spec.format == "openai":
        created = int(begun.timestamp())
        return lambda item, row: response_line(item, row, spec.model_name, created)
    layout = layout_of(spec)
    names = layout.our_names

    def line_of(item: Item, row: Row) -> Line:
        record = written_back(item.record, row, spec)
        ours = columns_of(row)
        if layout.json_schema:
            ours = {**ours, PARSED: parsed_in(row)}
        return layout.passed_through(record) | {names[name]: ours[name] for name in names}

    return line_of


def _write_jsonl(path: Path, rows: Rows, line_of: Callable[[Item, Row], Line]) -> int:
    written = 0
    with path.open("wb") as file:
        for chunk, ours in rows.joined():
            for record, row in zip(chunk.records, ours, strict=True):
                item = item_of(record)
                file.write(dump(line_of(item, row), is_odd=bool(item.notes)) + b"\n")
            written += len(ours)
    return written


def _write_parquet(path: Path, rows: Rows, spec: Spec) -> int:
    """Write row groups; a column whose values turn out not to fit its type starts it over."""
    layout = layout_of(spec)
    types = layout.passed_through(column_types(rows.chunks()))
    parsed = column_of(layout.json_schema) if layout.json_schema else None
    while True:
        try:
            return _write_row_groups(path, rows, types, spec, parsed)
        except Misfit as misfit:
            if misfit.column == layout.our_names.get(PARSED):
                parsed = AS_TEXT
            else:
                types[misfit.column] = None


def _write_row_groups(
    path: Path, rows: Rows, types: ColumnTypes, spec: Spec, parsed: Column | None
) -> int:
    theirs = pa.schema({name: kind or pa.string() for name, kind in types.items()})
    names = layout_of(spec).our_names
    ours = pa.schema([field.with_name(names[field.name]) for field in ROW_SCHEMA])
    if parsed is not None:
        ours = ours.append(pa.field(names[PARSED], parsed.type))
    schema = pa.schema([*theirs, *ours])
    written = 0
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for chunk, chunk_rows in rows.joined():
            columns = input_columns(_written_back(chunk, chunk_rows, spec), types)
            columns += pa.RecordBatch.from_pylist(chunk_rows, ROW_SCHEMA).columns
            if parsed is not None:
                columns.append(_parsed(parsed, chunk_rows, names[PARSED]))
            write_batch(writer, pa.RecordBatch.from_arrays(columns, schema=schema))
            written += len(chunk_rows)
    return written


def _parsed(column: Column, rows: Sequence[Row], name: str) -> pa.Array:
    try:
        return column.array(map(parsed_in, rows))
    except MISFITS as error:
        raise Misfit(name) from error


def _written_back(chunk: Chunk, rows: Sequence[Row], spec: Spec) -> Chunk:
    """Give a chunk the conversations that were made again; their column has no Arrow data then."""
    if spec.regenerate is None:
        return chunk
    items = [item_of(record) for record in chunk.records]
    new = [written_back(item.record, row, spec) for item, row in zip(items, rows, strict=True)]
    pairs = zip(items, new, strict=True)
    changed = {n for item, record in pairs for n in record if record[n] is not item.record[n]}
    records = tuple(item._replace(record=record) for item, record in zip(items, new, strict=True))
    batch = chunk.batch
    if batch is not None:
        batch = batch.drop_columns([name for name in batch.schema.names if name in changed])
    return Chunk(records, batch)
