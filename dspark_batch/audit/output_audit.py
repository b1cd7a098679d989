"""Whether an output is what the journal and the input make of it, row by row."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from dspark_batch.audit.replay import first_difference
from dspark_batch.intake.reader import Source, item_of, read
from dspark_batch.types import Item, Json

_Digests: TypeAlias = Sequence[str]

_MOST_QUOTED = 20  # changed rows whose change is shown


def output_problems(output: Source, remade: Source) -> Iterator[str]:
    """Compare an output with one that was just written from the same rows.

    Keeps one digest of each row in memory.

    Args:
        output: as it lies there.
        remade: as it must be.
    """
    there = [item_of(record).digest for record in read([output])]
    expected = [item_of(record).digest for record in read([remade])]
    if there == expected:
        return
    lost = _surplus(expected, there)  # rows that are expected and not there
    found = _surplus(there, expected)
    doubled = [i for i in found if there[i] in set(expected)]
    foreign = [i for i in found if there[i] not in set(expected)]
    yield from _changed(output, remade, list(zip(foreign, lost, strict=False)))
    yield from (f"row {i + 1} stands there twice" for i in doubled)
    yield from (f"row {i + 1} is no row of this job" for i in foreign[len(lost) :])
    names = _items(remade, lost[len(foreign) :])
    yield from (f"row {i + 1} is missing: custom_id {item.custom_id}" for i, item in names.items())
    if not (lost or found):
        yield _out_of_order(there, expected)


def _surplus(a: _Digests, b: _Digests) -> list[int]:
    """List the places of what `a` has more often than `b`."""
    left, places = Counter(b), []
    for place, digest in enumerate(a):
        if left[digest]:
            left[digest] -= 1
        else:
            places.append(place)
    return places


def _out_of_order(there: _Digests, expected: _Digests) -> str:
    pairs = enumerate(zip(there, expected, strict=True))
    wrong = [place for place, (a, b) in pairs if a != b]
    belongs = expected.index(there[wrong[0]])
    return (
        f"{len(wrong)} rows are out of order: where row {wrong[0] + 1} belongs stands row "
        f"{belongs + 1}"
    )


def _changed(output: Source, remade: Source, pairs: Sequence[tuple[int, int]]) -> Iterator[str]:
    quoted = pairs[:_MOST_QUOTED]
    there = _items(output, [place for place, _ in quoted])
    expected = _items(remade, [place for _, place in quoted])
    for a, b in quoted:
        said = _first_change(there[a].record, expected[b].record)
        yield f"row {a + 1} (custom_id {expected[b].custom_id}) was changed: {said}"
    if len(pairs) > len(quoted):
        yield f"{len(pairs) - len(quoted)} more rows were changed"


def _items(source: Source, places: Iterable[int]) -> dict[int, Item]:
    """Read the records at some places."""
    wanted = set(places)
    if not wanted:
        return {}
    items = (item_of(record) for record in read([source], range(max(wanted) + 1)))
    return {item.index: item for item in items if item.index in wanted}


def _first_change(there: Json, expected: Json, name: str = "") -> str:
    """Name the first field that differs, and both values."""
    if isinstance(there, Mapping) and isinstance(expected, Mapping):
        for key in dict.fromkeys((*expected, *there)):
            if there.get(key) != expected.get(key) or (key in there) != (key in expected):
                inner = f"{name}.{key}" if name else str(key)
                return _first_change(there.get(key), expected.get(key), inner)
        return "it has other bytes for the same values"
    return f"{name or 'it'} is {_short(there, expected)}, expected {_short(expected, there)}"


def _short(value: Json, other: Json) -> str:
    """Quote a value, of a long text the part around the first character that differs."""
    if isinstance(value, str) and isinstance(other, str) and len(value) > 40:
        at = max(0, first_difference(value, other) - 10)
        return f"…{value[at : at + 30]!r}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
