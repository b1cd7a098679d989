"""What a recurrent layer remembers: the end of its convolution's input, and a state.

Neither can be cut. So a step leaves both as they were, and its tape beside them: the convolution's
input, and what went into the recurrence. `keep` replays the tokens that have happened. Recorded
are results of the step itself, so no product runs again, and the replay has the bits that a step
of these tokens alone has.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, TypeAlias

import mlx.core as mx

from dspark_batch.caches.slot_cache import Arrays, Extent, Joined

# Inputs [S, W, ...] and a state [S, ...] or None for zeros, and which tokens [S, W] happen or None
# for all: outputs [S, W, ...] and the state behind the tokens that happen.
Recurrence: TypeAlias = Callable[
    [Arrays, mx.array | None, mx.array | None], tuple[mx.array, mx.array]
]


class State(NamedTuple):
    """What a layer remembers of one slot, which holds for one length only."""

    arrays: Arrays  # the window [K-1, C] and, with a recurrence, the state [...]

    def cut(self, stop: int) -> None:
        """Return nothing: nobody knows what it was before."""


class StateCache:
    """One layer's windows [S, K-1, C] and states [S, ...]; shares the extent of its owner.

    Offers what mlx-lm's models use of a cache: `[0]`, `[1]`, `lengths`, `make_mask`, `advance`.

    Args:
        extent: of the owner.
        window: K - 1, how many inputs of its convolution a layer looks back.
        recurrence: None: the layer has only a convolution.
    """

    is_ragged = False
    lengths = None  # mlx-lm need not cut its own window

    def __init__(self, extent: Extent, window: int, recurrence: Recurrence | None) -> None:
        self._extent = extent
        self._window = window
        self._recurrence = recurrence
        self._held: Arrays = []  # window and state
        self._convolved: mx.array | None = None  # of the last step, [S, K-1 + W, C]
        self._taped: Arrays = []  # of the last step: the inputs of the recurrence, or its result

    def __getitem__(self, number: int) -> mx.array | None:
        """Return what a step begins with, [S, ...]: 0 the window, 1 the state."""
        return self._held[number] if number < len(self._held) else None

    def __setitem__(self, number: int, array: mx.array) -> None:
        """Take no notice of what is there behind all tokens of the step."""

    def advance(self, count: int) -> None:
        """Take no notice: `keep` tells."""

    def make_mask(self, width: int) -> mx.array | None:
        """Say which tokens of a step happen, [S, width]; None: `keep` will tell."""
        counts = self._extent.expected
        return None if counts is None else self._extent.places(width) < counts[:, None]

    def convolve(self, inputs: mx.array) -> None:
        """Record what the layer's convolution reads, [S, K-1 + W, C]."""
        self._convolved = inputs

    def update(self, inputs: Arrays) -> tuple[mx.array, mx.array]:
        """Run the recurrence over a step; return its outputs and its last state."""
        mask = self.make_mask(inputs[0].shape[1])
        outputs, state = self._run(inputs, self[1], mask)
        self._taped = [state] if mask is not None else inputs
        return outputs, state

    def held(self) -> Arrays:
        """List window and state; none before the first step."""
        return self._held

    def left(self) -> Arrays:
        """List the tape."""
        return [] if self._convolved is None else [self._convolved, *self._taped]

    def hold(self, arrays: Arrays) -> None:
        """Put others in place of window and state; no step is behind them."""
        self._held, self._convolved, self._taped = list(arrays), None, []

    def leave(self, arrays: Arrays) -> None:
        """Put another tape in place of the last step's."""
        self._convolved, *self._taped = arrays

    def keep(self, counts: mx.array) -> None:
        """Let the first counts[s] tokens of the last step have happened, the others not."""
        if self._convolved is None:
            raise ValueError("keep needs a step before it")
        index = (counts[:, None] + self._extent.places(self._window))[..., None]
        held = [mx.take_along_axis(self._convolved, index, axis=1)]
        if self._recurrence is not None:
            held.append(self._behind(counts))
        self._held, self._convolved, self._taped = held, None, []

    def clear(self, slots: mx.array) -> None:
        """Forget what some slots [n] held: an old state would always be visible."""
        for array in self._held:
            array[slots] = 0

    def share(self, positions: int, slot: int) -> None:
        """Do nothing: it remembers no positions."""

    def resize(self, kept: Sequence[int], slots: int) -> None:
        """Keep some slots, in this order, as the first of `slots`; the others are zero."""
        self._held = [_resized(array, kept, slots) for array in self._held]

    def insert(self, slots: Sequence[int], other: Self, chosen: Sequence[int]) -> None:
        """Replace slots by chosen ones of `other`."""
        where = mx.array(list(slots))
        if not other._held:
            self.clear(where)
            return
        if not self._held:
            self._held = [mx.zeros((self._num_slots, *a.shape[1:]), a.dtype) for a in other._held]
        which = mx.array(list(chosen), dtype=mx.int32)
        for mine, theirs in zip(self._held, other._held, strict=True):
            mine[where] = theirs[which]

    def snapshot(self, slot: int, start: int, stop: int) -> State:
        """Copy what a slot that is `stop` positions long remembers."""
        return State([mx.contiguous(array[slot]) for array in self._held])

    def begin_with(self, joined: Joined, at: int) -> None:
        """Begin all slots with parts of which this layer's have the number `at`."""
        layers = [end and end.layers[at] for end in joined.ends]
        ends = [layer.arrays if layer else None for layer in layers]
        blank = [mx.zeros_like(array) for array in next(filter(None, ends))]
        rows = zip(*(end or blank for end in ends), strict=True)
        self._held = [mx.stack(list(each)) for each in rows]

    @property
    def bytes_per_position(self) -> int:
        """Nothing: it takes the same, however long a slot is."""
        return 0

    @property
    def bytes_per_slot(self) -> int:
        """What a slot takes; known behind the first step."""
        return sum(array.nbytes // array.shape[0] for array in self._held)

    def _run(
        self, inputs: Arrays, state: mx.array | None, mask: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        if self._recurrence is None:
            raise ValueError("this layer has only a convolution")
        return self._recurrence(inputs, state, mask)

    @property
    def _num_slots(self) -> int:
        return self._extent.lengths.shape[0]

    def _behind(self, counts: mx.array) -> mx.array:
        """Return the states behind the tokens that happened."""
        if self._extent.expected is not None:  # the step knew them
            return self._taped[0]
        mask = self._extent.places(self._taped[0].shape[1]) < counts[:, None]
        state = self._held[1] if self._held else None
        return self._run(self._taped, state, mask)[1]


def _resized(array: mx.array, kept: Sequence[int], slots: int) -> mx.array:
    rows = array[mx.array(list(kept), dtype=mx.int32)]
    return mx.pad(rows, [(0, slots - len(kept)), *[(0, 0)] * (array.ndim - 1)])
