"""Conditions about rows, as options write them: `error.code=engine`, `status=skipped`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        is_there, value = self.look_up(row)
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return is_there is not False and text == self.value

    def look_up(self, row: Mapping[str, Json]) -> tuple[bool | None, Json]:
        """Say whether a row has the column, and what is there; None: a null stands before it."""
        value: Json = row
        for name in (self.column,) if self.column in row else self.column.split("."):
            if value is None:
                return None, None
            if not isinstance(value, Mapping) or name not in value:
                return False, None
            value = value[name]
        return True, value


class Meant:
    """Says which rows are meant: those for which one of the conditions holds; without any, all."""

    def __init__(self, conditions: Sequence[Where]) -> None:
        self._conditions = tuple(conditions)
        # Condition -> names in rows without it.
        self._unseen: dict[Where, dict[str, None]] = {each: {} for each in conditions}

    def __call__(self, row: Mapping[str, Json]) -> bool:
        """Whether a row is meant."""
        for each in tuple(self._unseen):
            is_there, _ = each.look_up(row)
            if is_there:
                del self._unseen[each]
            elif is_there is False:
                self._unseen[each] |= dict.fromkeys(_names_in(row))
        return not self._conditions or any_of(self._conditions)(row)

    def check(self, out: str) -> None:
        """Refuse a column that no row had, once all rows were seen.

        Raises:
            UsageError: naming the column that was probably meant.
        """
        for each, names in self._unseen.items():
            if names:
                raise UsageError(
                    f"--where {each.column}={each.value}: no row of {out} has such a column"
                    f"{nearest(each.column, names)}; columns are "
                    f"{', '.join(name for name in names if '.' not in name)}."
                )


def _names_in(row: Mapping[str, Json]) -> Iterator[str]:
    """Name the columns of a row, and the fields in them."""
    for name, value in row.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _names_in(value))


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
