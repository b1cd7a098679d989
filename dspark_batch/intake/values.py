"""What the values of an Arrow array are in JSON, column by column; no type and no value raises.

Binary becomes base64, times and decimals become text, NaN becomes null when it is written. A map,
and a struct with two fields of one name, become a list of pairs. A value that JSON cannot say is
Unreadable: it costs its record, and nothing else.
"""

from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias
from uuid import UUID

import pyarrow as pa

Values: TypeAlias = list[Any]  # JSON, or Unreadable instead of it at any depth
Say: TypeAlias = "Callable[[pa.Array], Values]"  # values_of, for what is nested

_OUT_OF_RANGE = "<value out of range: "  # how Arrow prints a time that no calendar has


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value that has no place in JSON."""

    why: str  # goes on after "the value of column `x` is "
    value: str  # what it was, for digests


def values_of(array: pa.Array, *, binary_is_text: bool = False) -> Values:
    """Say the values of an array in JSON, in order.

    Args:
        array: of any type.
        binary_is_text: decode binary, as some writers of tables store text; else it is base64.
    """
    kind = array.type
    if _is_binary(kind) and binary_is_text:
        return _of_raw_texts(array)
    for is_kind, of_kind in _FLAT:
        if is_kind(kind):
            return of_kind(array)
    for is_kind, of_nested in _NESTED:
        if is_kind(kind):
            return of_nested(array, partial(values_of, binary_is_text=binary_is_text))
    return array.to_pylist()


def text_or_unreadable(raw: bytes) -> str | Unreadable:
    """Decode UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return Unreadable(f"not valid UTF-8 ({error})", b64encode(raw).decode())


def taken(batch: pa.RecordBatch, places: Sequence[int]) -> pa.RecordBatch:
    """Select rows by their places, in any order and as often as they are named."""
    columns = [taken_of(column, places) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def taken_of(array: pa.Array, places: Sequence[int | None]) -> pa.Array:
    """Select values by their places; None: null."""
    if not places:
        return array.slice(0, 0)
    try:
        return array.take(pa.array(places, pa.int64()))
    except pa.ArrowNotImplementedError:  # views, for example
        null = pa.nulls(1, array.type)
        return pa.concat_arrays([null if i is None else array.slice(i, 1) for i in places])


def _of_extension(array: pa.ExtensionArray, say: Say) -> Values:
    values = say(array.storage)
    if array.type.extension_name == "arrow.uuid":
        raw = array.storage.to_pylist()
        return [None if each is None else str(UUID(bytes=each)) for each in raw]
    if array.type.extension_name == "arrow.bool8":
        return [None if value is None else bool(value) for value in values]
    return values


def _of_texts(array: pa.Array) -> Values:
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        is_view = pa.types.is_string_view(array.type)
        return _of_raw_texts(array.cast(pa.binary_view() if is_view else pa.large_binary()))


def _of_raw_texts(array: pa.Array) -> Values:
    return [None if each is None else text_or_unreadable(each) for each in array.to_pylist()]


def _of_binary(array: pa.Array) -> Values:
    return [None if each is None else b64encode(each).decode() for each in array.to_pylist()]


def _of_decimals(array: pa.Array) -> Values:
    return [None if each is None else str(each) for each in array.to_pylist()]


def _of_halves(array: pa.Array) -> Values:
    return array.cast(pa.float32()).to_pylist()


def _of_times(array: pa.Array) -> Values:
    """Print times by Arrow: Python's own types end at year 9999 and at microseconds."""
    texts = array.cast(pa.string())
    return [_time(text) for text in texts.to_pylist()]


def _of_zoned(array: pa.TimestampArray) -> Values:
    """Print times in their zone, or in UTC where nobody here knows that zone."""
    unit = array.type.unit
    try:
        there = array.cast(pa.string())
    except pa.ArrowInvalid:
        there = array.cast(pa.timestamp(unit, "UTC")).cast(pa.string())
    # Arrow finds out what is out of range only without a zone.
    in_utc = _of_times(array.cast(pa.timestamp(unit)))
    zoned = zip(in_utc, there.to_pylist(), strict=True)
    return [utc if isinstance(utc, Unreadable) else text for utc, text in zoned]


def _time(text: str | None) -> str | Unreadable | None:
    if text is None or not text.startswith(_OUT_OF_RANGE):
        return text
    number = text.removeprefix(_OUT_OF_RANGE).removesuffix(">")
    return Unreadable(f"a time that no calendar or clock has ({number})", text)


def _of_intervals(array: pa.Array) -> Values:
    return [None if each is None else list(each) for each in array.to_pylist()]


def _of_dictionary(array: pa.DictionaryArray, say: Say) -> Values:
    words = say(array.dictionary)
    return [None if index is None else words[index] for index in array.indices.to_pylist()]


def _of_runs(array: pa.RunEndEncodedArray, say: Say) -> Values:
    import pyarrow.compute as pc  # slow to import

    return say(pc.run_end_decode(array))


def _of_union(array: pa.UnionArray, say: Say) -> Values:
    return [say(pa.repeat(scalar.value, 1))[0] for scalar in array]


def _of_struct(array: pa.StructArray, say: Say) -> Values:
    names = [field.name for field in array.type]
    make = dict if len(set(names)) == len(names) else _pairs
    columns = [say(column) for column in array.flatten()]
    rows = zip(*columns, strict=True) if columns else [()] * len(array)
    return [
        make(zip(names, row, strict=True)) if is_there else None
        for row, is_there in zip(rows, array.is_valid().to_pylist(), strict=True)
    ]


def _of_map(array: pa.MapArray, say: Say) -> Values:
    spans = _spans(array)
    first, end = _reach(spans)
    keys = say(array.keys.slice(first, end - first))
    items = say(array.items.slice(first, end - first))
    pairs = _pairs(zip(keys, items, strict=True))
    return [None if span is None else pairs[span[0] - first : span[1] - first] for span in spans]


def _pairs(pairs: Iterator[tuple[Any, Any]]) -> Values:
    return [list(pair) for pair in pairs]


def _of_lists(array: pa.ListArray, say: Say) -> Values:
    spans = _spans(array)
    first, end = _reach(spans)
    values = say(array.values.slice(first, end - first))
    return [None if span is None else values[span[0] - first : span[1] - first] for span in spans]


def _spans(array: pa.ListArray) -> list[tuple[int, int] | None]:
    """Say where the elements of each list begin and end; None: a null."""
    if pa.types.is_fixed_size_list(array.type):
        size, begin = array.type.list_size, array.offset
        spans = [(i * size, (i + 1) * size) for i in range(begin, begin + len(array))]
    elif pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        both = zip(array.offsets.to_pylist(), array.sizes.to_pylist(), strict=True)
        spans = [(begin, begin + size) for begin, size in both]
    else:
        spans = list(pairwise(array.offsets.to_pylist()))
    valid = array.is_valid().to_pylist()
    return [span if is_there else None for span, is_there in zip(spans, valid, strict=True)]


def _reach(spans: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """Find the part of all elements that is asked for; a slice of an array keeps the others."""
    there = [span for span in spans if span is not None]
    return min((b for b, _ in there), default=0), max((e for _, e in there), default=0)


def _is_extension(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _TEXTS)


def _is_binary(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _BINARIES)


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _LISTS)


def _is_zoned(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) and kind.tz is not None


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARIES = (
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
    pa.types.is_fixed_size_binary,
)
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
_FLAT: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Array], Values]], ...] = (
    (_is_text, _of_texts),
    (_is_binary, _of_binary),
    (pa.types.is_decimal, _of_decimals),
    (pa.types.is_float16, _of_halves),
    (pa.types.is_interval, _of_intervals),
    (_is_zoned, _of_zoned),
    (pa.types.is_temporal, _of_times),
)
_NESTED: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Array, Say], Values]], ...] = (
    (_is_extension, _of_extension),
    (pa.types.is_dictionary, _of_dictionary),
    (pa.types.is_run_end_encoded, _of_runs),
    (pa.types.is_union, _of_union),
    (pa.types.is_struct, _of_struct),
    (pa.types.is_map, _of_map),
    (_is_list, _of_lists),
)
