"""Conditions about rows, as options write them: `error.code=engine`, `status=skipped`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dspark_batch.errors import UsageError
from dspark_batch.spec.nearest import nearest
from dspark_batch.types import Json

Holds: TypeAlias = Callable[[Mapping[str, Json]], bool]  # row -> whether it is meant

_OF_FAILURES = ("status", "error.code")
_FAILED = ("errored", "skipped")


@dataclass(frozen=True, slots=True)
class Where:
    """Rows that have a value in a column, or in a field of one."""

    column: str  # with dots: a field of a struct
    value: str  # of what is no string, its JSON

    def __call__(self, row: Mapping[str, Json]) -> bool:
        """Whether a row has it."""
        value: Json = row
        for name in self.column.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return text == self.value


def any_of(conditions: Sequence[Where]) -> Holds:
    """Mean the rows for which at least one condition holds."""
    return lambda row: any(condition(row) for condition in conditions)


def read_where(option: str, text: str) -> Where:
    """Read a condition.

    Raises:
        UsageError: it is none.
    """
    column, is_there, value = text.partition("=")
    if not (column and is_there):
        raise UsageError(
            f"{option} {text}: expected COLUMN=VALUE, such as status=skipped or error.code=engine."
        )
    return Where(column, value)


def read_retry(text: str) -> Where:
    """Read a condition about failures, which are all that can run again.

    Raises:
        UsageError: it is none, or about answers.
    """
    where = read_where("--retry-where", text)
    if where.column == "finish_reason" or where == Where("status", "succeeded"):
        raise UsageError(
            f"--retry-where {text}: with these settings the same answers would come out. Take the "
            f"records out with `dspark-batch export OUT again.jsonl --inputs --where {text}`, and "
            "run that file with other settings into another output."
        )
    if where.column not in _OF_FAILURES:
        raise UsageError(
            f"--retry-where {text}: expected {' or '.join(_OF_FAILURES)}, which failures have"
            f"{nearest(where.column, _OF_FAILURES)}."
        )
    if where.column == "status" and where.value not in _FAILED:
        raise UsageError(
            f"--retry-where {text}: expected {' or '.join(_FAILED)}{nearest(where.value, _FAILED)}."
        )
    return where
