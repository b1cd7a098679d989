"""Finds the rows of a journal again by what they answer, in 40 bytes for each row."""

from array import array
from bisect import bisect_left, bisect_right
from hashlib import blake2b
from itertools import pairwise

import pyarrow as pa

_TYPES = {"Q": pa.uint64(), "q": pa.int64()}
_FREE, _FAILED, _GONE = range(3)  # a failure is for its own item only; gone: taken, or replaced


def key_of(name: str, digest: str, sample_index: int) -> bytes:
    """Name an answered record in 16 bytes, which no two of them share by chance."""
    return blake2b(f"{digest}/{sample_index}/{name}".encode(), digest_size=16).digest()


class RowIndex:
    """Rows by key and item index, of which each can be taken once. First add all, then look.

    Of rows with the same key and index the last one wins.
    """

    def __init__(self) -> None:
        self._high, self._low = array("Q"), array("Q")  # the two halves of the keys
        self._indexes = array("q")
        self._places = array("q")  # twice the offset in the journal, and 1 more for a failure
        self._states = bytearray()  # by row once they are sorted; empty before

    def add(self, key: bytes, index: int, offset: int, *, failed: bool) -> None:
        """Add a row; offsets ascend."""
        self._high.append(int.from_bytes(key[:8]))
        self._low.append(int.from_bytes(key[8:]))
        self._indexes.append(index)
        self._places.append(2 * offset + failed)

    def count(self) -> tuple[int, int]:
        """Count the rows that nobody has taken, and the failures among them."""
        self._sort()
        failed = self._states.count(_FAILED)
        return self._states.count(_FREE) + failed, failed

    def own(self, key: bytes, index: int) -> int | None:
        """Find the row of an item at its own index; None: there is none."""
        first, end = self._span(key)
        row = bisect_right(self._indexes, index, first, end) - 1
        if row < first or self._indexes[row] != index or self._states[row] == _GONE:
            return None
        return row

    def other(self, key: bytes) -> int | None:
        """Find an answer of an equal item at any index; None: there is none."""
        row = self._states.find(_FREE, *self._span(key))
        return None if row < 0 else row

    def is_failure(self, row: int) -> bool:
        """Whether a row that was found tells of a failure."""
        return self._places[row] % 2 == 1

    def offset(self, row: int) -> int:
        """Say where in the journal a row that was found is."""
        return self._places[row] // 2

    def take(self, row: int) -> None:
        """Let nobody find a row again."""
        self._states[row] = _GONE

    def _span(self, key: bytes) -> tuple[int, int]:
        """Find the rows with a key."""
        self._sort()
        high, low = int.from_bytes(key[:8]), int.from_bytes(key[8:])
        first = bisect_left(self._high, high)
        end = bisect_right(self._high, high, first)
        return bisect_left(self._low, low, first, end), bisect_right(self._low, low, first, end)

    def _sort(self) -> None:
        """Sort by key, index and age, once."""
        if self._states or not self._places:
            return
        import pyarrow.compute as pc  # slow to import

        columns = [self._high, self._low, self._indexes, self._places]
        table = pa.table([_arrow(column) for column in columns], names=[*"hlip"])
        order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in "hlip"])
        for column in columns:
            _reorder(column, order)
        self._states = bytearray(_FAILED if place % 2 else _FREE for place in self._places)
        items = zip(self._high, self._low, self._indexes, strict=True)
        for row, (here, following) in enumerate(pairwise(items)):
            if here == following:
                self._states[row] = _GONE


def _arrow(column: "array[int]") -> pa.Array:
    """See a column as Arrow does, without a copy."""
    return pa.Array.from_buffers(_TYPES[column.typecode], len(column), [None, pa.py_buffer(column)])


def _reorder(column: "array[int]", order: pa.Array) -> None:
    """Put a column in order, in its place."""
    whole = memoryview(column).cast("B")
    ordered = memoryview(_arrow(column).take(order).buffers()[1]).cast("B")
    whole[:] = ordered[: len(whole)]  # Arrow's buffers may be longer
