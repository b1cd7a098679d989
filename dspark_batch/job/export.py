"""Copy an output to another file: JSON lines or Parquet, all columns or some, finished or not."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.errors import UsageError
from dspark_batch.job.columns import ColumnTypes, Misfit, column_types, input_columns
from dspark_batch.job.finish import write_output
from dspark_batch.job.look import look
from dspark_batch.job.reader import Chunk, Source, item_of, read_chunks
from dspark_batch.job.rows import ROW_SCHEMA, Layout, layout_of
from dspark_batch.job.run_dir import RunDir, full_disk_is_resumable, sync_file
from dspark_batch.job.spec import OUTPUTS
from dspark_batch.types import Failure


def export(out: str, to: str, columns: Sequence[str] = (), *, overwrite: bool = False) -> int:
    """Copy the rows of `out` to another file, and return how many there are.

    Args:
        out: the output of a job; if it is not finished, the rows that there are, in input order.
        to: *.jsonl or *.parquet.
        columns: those to copy, in this order; (): all.
        overwrite: replace `to` if it is there.

    Raises:
        UsageError: `to` cannot be written so, or there is no such column or output.
    """
    target = Path(to)
    if target.suffix not in OUTPUTS:
        raise UsageError(f"{to}: expected a name that ends in {' or '.join(OUTPUTS)}; rename it.")
    if target.exists() and not overwrite:
        raise UsageError(f"{to} exists; choose another name, or replace it with --overwrite.")
    draft = target.with_name(f".{target.name}.tmp")
    write = _write_parquet if target.suffix == ".parquet" else _write_jsonl
    try:
        with _whole(out, target.parent) as whole, full_disk_is_resumable(target):
            written = write(draft, Source(out, whole), _types(out), columns)
            sync_file(draft)
            draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return written


@contextmanager
def _whole(out: str, folder: Path) -> Iterator[Path]:
    """Give the output, or a file like it with the rows of a job that is not finished.

    Args:
        out: the output.
        folder: where such a file finds room.
    """
    if Path(out).exists():
        yield Path(out)
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


def _chunks(source: Source) -> Iterator[Chunk]:
    for chunk in read_chunks([source]):
        for record in chunk.records:
            if isinstance(record, Failure):
                raise UsageError(f"{record.message} This is no output of ours.")
        yield chunk


def _chosen(known: Sequence[str], columns: Sequence[str]) -> Sequence[str]:
    missing = [name for name in columns if name not in known]
    if missing:
        raise UsageError(
            f"--columns: no column `{missing[0]}`; columns are "
            f"{', '.join(f'`{name}`' for name in known)}."
        )
    return columns or known


def _write_jsonl(path: Path, source: Source, ours: ColumnTypes, columns: Sequence[str]) -> int:
    names = _chosen(list(column_types(_chunks(source))), columns) if columns else None
    written = 0
    with path.open("wb") as file:
        for chunk in _chunks(source):
            for record in map(item_of, chunk.records):
                line = record.record
                if names is not None:
                    line = {name: line.get(name) for name in names}
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            written += len(chunk.records)
    return written


def _write_parquet(path: Path, source: Source, ours: ColumnTypes, columns: Sequence[str]) -> int:
    """Write row groups; a column whose values turn out not to fit its type starts it over."""
    found = column_types(_chunks(source))
    types = {name: ours.get(name, found[name]) for name in _chosen(list(found), columns)}
    while True:
        try:
            return _write_row_groups(path, source, types)
        except Misfit as misfit:
            types[misfit.column] = None


def _write_row_groups(path: Path, source: Source, types: ColumnTypes) -> int:
    schema = pa.schema({name: kind or pa.string() for name, kind in types.items()})
    written = 0
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for chunk in _chunks(source):
            arrays = input_columns(chunk, types)
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            written += len(chunk.records)
    return written
