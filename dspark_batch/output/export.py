"""Copy an output to another file: JSON lines or Parquet, all columns or some, finished or not."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.errors import UsageError
from dspark_batch.intake import remote
from dspark_batch.intake.json_text import dump
from dspark_batch.intake.reader import Chunk, Source, item_of, read_chunks
from dspark_batch.output.columns import (
    ColumnTypes,
    Misfit,
    column_types,
    input_columns,
    write_batch,
)
from dspark_batch.output.finish import write_output
from dspark_batch.output.look import Look, look
from dspark_batch.record.disk import full_disk_is_resumable, sync_file
from dspark_batch.record.rows import ROW_SCHEMA, Layout, columns_of, layout_of
from dspark_batch.record.run_dir import RunDir
from dspark_batch.spec.spec import OUTPUTS
from dspark_batch.spec.where import Meant, Where
from dspark_batch.types import Failure, Item

log = logging.getLogger("dspark_batch")


def export(
    out: str,
    to: str,
    columns: Sequence[str] = (),
    *,
    where: Sequence[Where] = (),
    overwrite: bool = False,
) -> int:
    """Copy the rows of `out` to another file, and return how many there are.

    Args:
        out: the output of a job; if it is not finished, the rows that there are, in input order.
        to: *.jsonl or *.parquet.
        columns: those to copy, in this order; (): all.
        where: only the rows for which one of these holds; (): all.
        overwrite: replace `to` if it is there.

    Raises:
        UsageError: `to` cannot be written so, or there is no such column or output.
    """
    target = Path(to)
    if target.suffix not in OUTPUTS:
        raise UsageError(f"{to}: expected a name that ends in {' or '.join(OUTPUTS)}; rename it.")
    write = _write_parquet if target.suffix == ".parquet" else _write_jsonl
    with _draft_at(out, to, overwrite=overwrite) as draft, _whole(out, draft.parent) as whole:
        return write(draft, _Rows(Source(out, whole), where), _types(out), columns)


def export_inputs(
    out: str, to: str, *, where: Sequence[Where] = (), overwrite: bool = False
) -> int:
    """Copy the records that the rows of `out` answer to a new input; return how many there are.

    A record without an id gets its `custom_id`, so that it keeps its name. What could not be read
    is no record any more: it is left out, and a warning says so.

    Args:
        out: the output of a job, finished or not.
        to: *.jsonl.
        where: only records with a row for which one of these holds; (): all with a row.
        overwrite: replace `to` if it is there.

    Raises:
        UsageError: `to` cannot be written so, or there is no such output or column, or no input
            any more.
    """
    target, job = Path(to), look(out)
    if target.suffix != ".jsonl":
        raise UsageError(f"{to}: --inputs are written to a name that ends in .jsonl; rename it.")
    written, unread = 0, list[str]()
    with _draft_at(out, to, overwrite=overwrite) as draft, draft.open("wb") as file:
        for item in _answered(job, Meant(where), out):
            if isinstance(item, Failure):
                unread.append(item.message)
                continue
            name = {"custom_id": item.custom_id} if item.custom_id.startswith("#") else {}
            file.write(dump({**name, **item.record}, is_odd=bool(item.notes)) + b"\n")
            written += 1
    if unread:
        log.warning(
            "%s: %d of the records cannot be copied and are left out; the first: %s",
            to,
            len(unread),
            unread[0],
        )
    return written


def _answered(job: Look, is_meant: Meant, out: str) -> Iterator[Item | Failure]:
    """Yield each record that has a meant row."""
    names, last = layout_of(job.spec).our_names, ""
    with job.rows() as rows:
        for record, entry in rows.recorded():
            item, ours = item_of(record), columns_of(entry.row)
            row = dict(item.record) | {names[name]: value for name, value in ours.items()}
            # The samples of a record stand beside each other.
            if item.where != last and is_meant(row):
                last = item.where
                yield record
    is_meant.check(out)


@contextmanager
def _draft_at(out: str, to: str, *, overwrite: bool) -> Iterator[Path]:
    """Give a file to write, which then takes its place whole or not at all."""
    _refuse_own_files(out, Path(to))
    if not remote.is_url(to):
        with _draft_of(Path(to), overwrite=overwrite) as draft:
            yield draft
        return
    remote.refuse_unwritable(to)
    remote.refuse_taken(to, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="dspark-batch-") as folder:
        draft = Path(folder, remote.local_name(to))
        yield draft
        remote.put(draft, to)


def _refuse_own_files(out: str, target: Path) -> None:
    """Refuse to replace the output, which its job knows to be whole, or an input of the job."""
    manifest = RunDir(out).manifest() or {"inputs": ()}
    own = [RunDir(out).out, *(Path(file["path"]) for file in manifest["inputs"])]
    if target.exists() and any(path.exists() and path.samefile(target) for path in own):
        raise UsageError(f"{target}: belongs to the job of {out}; choose another name.")


@contextmanager
def _draft_of(target: Path, *, overwrite: bool) -> Iterator[Path]:
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; choose another name, or replace it with --overwrite.")
    draft = target.with_name(f".{target.name}.tmp")
    try:
        with full_disk_is_resumable(target):
            yield draft
            sync_file(draft)
            draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _whole(out: str, folder: Path) -> Iterator[Path]:
    """Give the output, or a file like it with the rows of a job that is not finished.

    Args:
        out: the output.
        folder: where such a file finds room.
    """
    if RunDir(out).out.exists():
        yield RunDir(out).out
        return
    job = look(out)
    begun = datetime.fromisoformat(job.manifest["created"])
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as place, job.rows() as rows:
        partial = Path(place, f"rows{Path(out).suffix}")
        yield write_output(partial, rows, replace(job.spec, out=out), begun).replace(partial)


def _types(out: str) -> ColumnTypes:
    """Say what types our columns have, by the names that they have in this output."""
    layout = layout_of(look(out).spec) if RunDir(out).path.exists() else Layout()
    return {layout.our_names[field.name]: field.type for field in ROW_SCHEMA}


class _Rows:
    """The rows of an output, and those that are meant; can be walked many times."""

    def __init__(self, source: Source, where: Sequence[Where]) -> None:
        self._source, self._where = source, where

    def all_chunks(self) -> Iterator[Chunk]:
        for chunk in read_chunks([self._source]):
            for record in chunk.records:
                if isinstance(record, Failure):
                    raise UsageError(f"{record.message} This is no output of ours.")
            yield chunk

    def chunks(self) -> Iterator[Chunk]:
        is_meant = Meant(self._where)
        for chunk in self.all_chunks():
            yield chunk.only([is_meant(item_of(each).record) for each in chunk.records])
        is_meant.check(self._source.name)


def _chosen(known: Sequence[str], columns: Sequence[str]) -> Sequence[str]:
    missing = [name for name in columns if name not in known]
    if missing:
        raise UsageError(
            f"--columns: no column `{missing[0]}`; columns are "
            f"{', '.join(f'`{name}`' for name in known)}."
        )
    return columns or known


def _write_jsonl(path: Path, rows: _Rows, ours: ColumnTypes, columns: Sequence[str]) -> int:
    names = _chosen(list(column_types(rows.all_chunks())), columns) if columns else None
    written = 0
    with path.open("wb") as file:
        for chunk in rows.chunks():
            for record in map(item_of, chunk.records):
                line = record.record
                if names is not None:
                    line = {name: line.get(name) for name in names}
                file.write(dump(line, is_odd=bool(record.notes)) + b"\n")
            written += len(chunk.records)
    return written


def _write_parquet(path: Path, rows: _Rows, ours: ColumnTypes, columns: Sequence[str]) -> int:
    """Write row groups; a column whose values turn out not to fit its type starts it over."""
    found = column_types(rows.all_chunks())
    types = {name: ours.get(name, found[name]) for name in _chosen(list(found), columns)}
    while True:
        try:
            return _write_row_groups(path, rows, types)
        except Misfit as misfit:
            types[misfit.column] = None


def _write_row_groups(path: Path, rows: _Rows, types: ColumnTypes) -> int:
    schema = pa.schema({name: kind or pa.string() for name, kind in types.items()})
    written = 0
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for chunk in rows.chunks():
            arrays = input_columns(chunk, types)
            write_batch(writer, pa.RecordBatch.from_arrays(arrays, schema=schema))
            written += len(chunk.records)
    return written
