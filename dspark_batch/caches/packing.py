"""Which tokens of a step run, where slots have different numbers of them."""

from collections.abc import Sequence

import mlx.core as mx


class Packing:
    """The rows of a packed step: those tokens that somebody reads, one slot behind the other.

    Example: slots with 3, 1 and 2 tokens in a step that is 3 wide. A packed step runs over six
    rows, not nine, each one a batch entry of its own: what a model does to each token it does to
    these alone. Attention sees slots again: a place without a token has a copy of its slot's last
    row there, which nobody reads.

    Args:
        counts: tokens of each slot, 1 to `width`.
        width: of the step.
        lengths: [S] int32, cached tokens of each slot before the step.

    Attributes:
        width: of the step.
        offset: [R] int32, the position of each row.
    """

    def __init__(self, counts: Sequence[int], width: int, lengths: mx.array) -> None:
        self.width = width
        own = [(slot, at) for slot, count in enumerate(counts) for at in range(count)]
        starts = [sum(counts[:slot]) for slot in range(len(counts))]
        rows = zip(starts, counts, strict=True)
        row = [[start + min(at, count - 1) for at in range(width)] for start, count in rows]
        self._row = mx.array(row, dtype=mx.int32)  # of each place, [S, W]
        self._slot, self._at = (mx.array(each, dtype=mx.int32) for each in zip(*own, strict=True))
        self.offset = lengths[self._slot] + self._at

    def packed(self, places: mx.array) -> mx.array:
        """Take the rows [R, ...] out of what is there for each place, [S, W, ...]."""
        return places[self._slot, self._at]

    def unpacked(self, rows: mx.array) -> mx.array:
        """Give each place, [S, W, ...], its row of [R, ...]."""
        return rows[self._row]
