"""The Arrow types of the input columns in a Parquet output.

A Parquet input brings its types. Those of JSON lines are inferred from all records, so that a
column may begin with nulls. Where no Arrow type holds every value, the column becomes JSON text.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.intake.json_text import dump
from dspark_batch.intake.reader import Chunk, item_of
from dspark_batch.types import Item, Json

ColumnTypes: TypeAlias = dict[str, pa.DataType | None]  # None: JSON text

MISFITS = (pa.ArrowException, OverflowError, TypeError, ValueError)


class Misfit(Exception):
    """A column that has a value which its type cannot hold."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


def column_types(chunks: Iterable[Chunk]) -> ColumnTypes:
    """Find one type for each input column, in order of first appearance."""
    types: ColumnTypes = {}
    declared: set[str] = set()  # columns of tables, which know their types
    for chunk in chunks:
        declared |= set(chunk.batch.schema.names if chunk.batch is not None else ())
        for name, kind in _types_in(chunk).items():
            types[name] = _unified(types[name], kind) if name in types else kind
    return {name: _storable(types[name], is_declared=name in declared) for name in types}


def input_columns(chunk: Chunk, types: ColumnTypes) -> list[pa.Array]:
    """Build the input columns of one chunk.

    Raises:
        Misfit: a value does not fit the type that was found for its column.
    """
    return [_array(chunk, name, kind) for name, kind in types.items()]


def write_batch(writer: pq.ParquetWriter, batch: pa.RecordBatch) -> None:
    """Write rows.

    Raises:
        Misfit: a column has values that Parquet cannot hold, although it can hold their type.
    """
    try:
        writer.write_batch(batch)
    except pa.ArrowException as error:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if not _can_store(column):
                raise Misfit(name) from error
        raise


def _array(chunk: Chunk, name: str, kind: pa.DataType | None) -> pa.Array:
    if kind is None:
        return pa.array([_text(item, name) for item in map(item_of, chunk.records)], pa.string())
    values = [record.get(name) for record in _records(chunk)]
    try:
        if chunk.batch is not None and name in chunk.batch.schema.names:
            column = chunk.batch.column(name)
            return column if column.type == kind else column.cast(kind)
        return pa.array(values, kind)
    except MISFITS as error:
        raise Misfit(name) from error


def _types_in(chunk: Chunk) -> ColumnTypes:
    if chunk.batch is not None:
        return {field.name: field.type for field in chunk.batch.schema}
    values: dict[str, list[Json]] = {}
    for record in _records(chunk):
        for name, value in record.items():
            values.setdefault(name, []).append(value)
    return {name: _inferred(column) for name, column in values.items()}


def _records(chunk: Chunk) -> list[Mapping[str, Json]]:
    """List the columns of each record; one that could not be read has none."""
    return [item_of(record).record for record in chunk.records]


def _inferred(values: list[Json]) -> pa.DataType | None:
    try:
        return pa.array(values).type
    except MISFITS:
        return None


def _unified(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    if one is None or other is None:
        return None
    schemas = [pa.schema({"x": kind}) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except MISFITS:
        return None


def _storable(kind: pa.DataType | None, *, is_declared: bool) -> pa.DataType | None:
    """Replace what Parquet has no place for, such as a struct without fields.

    Nulls in JSON have no type, so a column of nothing else gets that of text.
    """
    if kind is None or not _can_store(pa.nulls(1, kind)):
        return None
    return pa.string() if pa.types.is_null(kind) and not is_declared else kind


def _can_store(array: pa.Array) -> bool:
    """Whether Parquet can hold these values, so that they can be read again."""
    file = pa.BufferOutputStream()
    try:
        pq.write_table(pa.table({"x": array}), file)
        pq.read_table(pa.BufferReader(file.getvalue()))
    except (*MISFITS, OSError):
        return False
    return True


def _text(item: Item, name: str) -> str | None:
    value = item.record.get(name)
    return None if value is None else dump(value, is_odd=bool(item.notes)).decode()
