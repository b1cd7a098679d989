"""The column `parsed`: answers to a JSON Schema as values, in an Arrow type made from the schema.

    {"type": "object", "properties": {"name": {"type": "string"}, "tags": {"type": "array", ...}}}
    -> struct<name: string, tags: list<element: string>>

What has no Arrow type, such as a union or an object with any properties, is JSON text.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import pyarrow as pa

from dspark_batch.intake.json_text import dump
from dspark_batch.spec.structure import Schema, schema_of, target_of
from dspark_batch.types import Json

_SCALARS = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
_ROOT = "#"

Fit: TypeAlias = Callable[[Json], Json]  # a value as its column has it; TypeError: it does not fit


class Column(NamedTuple):
    """The type of a value, and how it goes there."""

    type: pa.DataType
    fit: Fit

    def array(self, values: Iterable[Json]) -> pa.Array:
        """Build a column.

        Raises:
            ValueError, TypeError, OverflowError, ArrowException: a value does not fit.
        """
        return pa.array([None if value is None else self.fit(value) for value in values], self.type)


def column_of(schema: str) -> Column:
    """Find the type of what a schema allows."""
    whole = schema_of(schema)
    return _column(whole, whole, (_ROOT,))


def _text(value: Json) -> Json:
    return dump(value, is_odd=True).decode()


AS_TEXT = Column(pa.string(), _text)


def _column(schema: Schema, whole: Schema, within: tuple[str, ...]) -> Column:
    """Find the type of a part; `within` are the references that lead to it."""
    if not isinstance(schema, Mapping):
        return AS_TEXT
    ref, branches = schema.get("$ref"), schema.get("anyOf", schema.get("oneOf"))
    if isinstance(ref, str):
        is_part_of_itself = ref in within
        return (
            AS_TEXT if is_part_of_itself else _column(target_of(whole, ref), whole, (*within, ref))
        )
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = schema["enum"] if "const" not in schema else [schema["const"]]
        return _of_values(values if isinstance(values, list) else [])
    if isinstance(branches, list):
        return _one(branches, whole, within)
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return _one([{**schema, "type": kind} for kind in kinds], whole, within)
    if kinds == "object":
        return _struct(schema, whole, within)
    if kinds == "array" and "items" in schema and "prefixItems" not in schema:
        inner = _column(schema["items"], whole, within)
        kind = pa.list_(pa.field("element", inner.type))
        return Column(kind, partial(_list, inner))
    return Column(_SCALARS[kinds], _same) if kinds in _SCALARS else AS_TEXT


def _same(value: Json) -> Json:
    return value


def _list(inner: Column, value: Json) -> Json:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return [_or_none(inner, each) for each in value]


def _or_none(column: Column, value: Json) -> Json:
    return None if value is None else column.fit(value)


def _one(branches: list[Json], whole: Schema, within: tuple[str, ...]) -> Column:
    """Take the only branch that is not null; several of the same scalar are one."""
    some = [each for each in branches if not _is_null(each)]
    if len(some) == 1:
        return _column(some[0], whole, within)
    columns = [_column(each, whole, within) for each in some]
    kinds = {str(column.type) for column in columns}
    if columns and all(column.fit is _same for column in columns):
        if len(kinds) == 1:
            return columns[0]
        if kinds == {"int64", "double"}:
            return Column(pa.float64(), _same)
    return AS_TEXT


def _is_null(schema: Schema) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "null"


def _of_values(values: list[Json]) -> Column:
    kinds = {type(value) for value in values if value is not None}
    by_kind = {str: "string", bool: "boolean", int: "integer", float: "number"}
    if len(kinds) == 1 and kinds <= by_kind.keys():
        return Column(_SCALARS[by_kind[kinds.pop()]], _same)
    return Column(pa.float64(), _same) if kinds == {int, float} else AS_TEXT


def _struct(schema: Mapping[str, Json], whole: Schema, within: tuple[str, ...]) -> Column:
    named = schema.get("properties")
    if (
        not isinstance(named, Mapping)
        or not named
        or schema.get("additionalProperties") is not False
    ):
        return AS_TEXT
    columns = {name: _column(each, whole, within) for name, each in named.items()}

    def fit(value: Json) -> Json:
        if not isinstance(value, Mapping) or value.keys() - columns.keys():
            raise TypeError(f"{value!r} is no object of the schema")
        return {name: _or_none(columns[name], each) for name, each in value.items()}

    return Column(pa.struct({name: column.type for name, column in columns.items()}), fit)
