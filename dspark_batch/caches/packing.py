"""Which tokens of a step run, where slots have different numbers of them."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


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
        count, place = np.array(counts)[:, None], np.arange(width)
        slot, at = np.nonzero(place < count)  # of each row
        row = np.cumsum(counts)[:, None] - count + np.minimum(place, count - 1)
        self._row = mx.array(row.astype(np.int32))  # of each place, [S, W]
        self._place = mx.array((slot * width + at).astype(np.int32))  # of each row, [R]
        self.offset = self.packed(lengths[:, None] + mx.arange(width))

    def packed(self, places: mx.array) -> mx.array:
        """Take the rows [R, ...] out of what is there for each place, [S, W, ...]."""
        return places.flatten(0, 1)[self._place]

    def unpacked(self, rows: mx.array) -> mx.array:
        """Give each place, [S, W, ...], its row of [R, ...]."""
        return rows[self._row]
