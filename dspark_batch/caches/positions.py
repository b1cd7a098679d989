"""What attention remembers: keys and values of every position, left-aligned, of ragged lengths."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import mlx.core as mx

from dspark_batch import device
from dspark_batch.caches.slot_cache import Arrays, Extent, Joined
from dspark_batch.numerics.joined import owned
from dspark_batch.numerics.masks import ragged_causal


class KeysValues(NamedTuple):
    """A run of positions of one slot."""

    keys: mx.array  # [KV, T, D]
    values: mx.array  # [KV, T, D']

    @property
    def arrays(self) -> Arrays:
        """All that it holds."""
        return [self.keys, self.values]

    def cut(self, stop: int) -> "KeysValues":
        """Return its first `stop` positions."""
        return KeysValues(self.keys[:, :stop], self.values[:, :stop])


class PositionCache:
    """One layer's buffers, [S, KV, capacity, D] each; shares the extent of its owner.

    Offers what mlx-lm's models use of a cache: `offset`, `update_and_fetch`, `make_mask`.

    What lies behind a slot's length is never visible and is overwritten by the next step, so a
    rollback moves no data.
    """

    is_ragged = True  # attention over it is `numerics.attention.ragged_attention`

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self.keys: mx.array | None = None  # None: nothing written yet
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """The position of each slot's next token, [S] int32."""
        return self._extent.lengths

    @property
    def lengths(self) -> mx.array:
        """Cached tokens of each slot, [S] int32."""
        return self._extent.lengths

    @property
    def num_seen(self) -> int:
        """How many positions of the buffers a step may see."""
        return self._extent.seen

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [S, KV, T, D] behind each slot's length; return both whole buffers.

        The caller has reserved the room.
        """
        if self.keys is None or self.values is None:
            self.keys = _empty(keys, self._extent.capacity)
            self.values = _empty(values, self._extent.capacity)
        position = self._extent.lengths[:, None] + self._extent.places(keys.shape[2])
        index = position[:, None, :, None]
        self.keys = mx.put_along_axis(self.keys, index, keys, axis=2)
        self.values = mx.put_along_axis(self.values, index, values, axis=2)
        return self.keys, self.values

    def owned(self) -> tuple[mx.array, mx.array] | None:
        """Give both buffers for a kernel that writes a step into them; None: MLX has to write.

        What the kernel leaves is to be held in their place. Before the first step there are none
        yet, and MLX might make one of zeros for several layers.
        """
        if self.keys is None or self.values is None or not device.launches_one_by_one():
            return None
        return owned(self.keys), owned(self.values)

    def make_mask(
        self, width: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Build the causal mask of a step; see `numerics.masks.ragged_causal`."""
        return ragged_causal(self._extent.lengths, width, self._extent.capacity, window_size)

    def held(self) -> Arrays:
        """List keys and values, [S, KV, capacity, D]; none before the first step."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def left(self) -> Arrays:
        """List the same: a step writes into them."""
        return self.held()

    def hold(self, arrays: Arrays) -> None:
        """Put others in place of both; none before the first step."""
        self.keys, self.values = arrays or (None, None)

    def leave(self, arrays: Arrays) -> None:
        """Put others in place of both."""
        self.hold(arrays)

    def keep(self, counts: mx.array) -> None:
        """Do nothing: the owner's lengths say it."""

    def clear(self, slots: mx.array) -> None:
        """Do nothing: the owner's lengths say it."""

    def resize(self, kept: Sequence[int], slots: int) -> None:
        """Keep some slots, in this order, as the first of `slots`; zeros follow everywhere."""
        if self.keys is not None and self.values is not None:
            self.keys = _resized(self.keys, kept, slots, self._extent.capacity)
            self.values = _resized(self.values, kept, slots, self._extent.capacity)

    def insert(self, slots: mx.array, other: Self, chosen: Sequence[int]) -> None:
        """Replace slots [n] by n chosen ones of `other`, whole.

        Zeros follow: a masked position has weight 0, and 0 times the NaN of a former owner is NaN.
        """
        # Where nothing was written, nothing of it will be read.
        if other.keys is None or other.values is None:
            return
        capacity = self._extent.capacity
        if self.keys is None or self.values is None:
            self.keys = _empty(other.keys, capacity, self._extent.lengths.shape[0])
            self.values = _empty(other.values, capacity, self._extent.lengths.shape[0])
        self.keys[slots] = _resized(other.keys, chosen, len(chosen), capacity)
        self.values[slots] = _resized(other.values, chosen, len(chosen), capacity)

    def snapshot(self, slot: int, start: int, stop: int) -> KeysValues:
        """Copy positions of a slot."""
        return KeysValues(*(mx.contiguous(a[slot, :, start:stop]) for a in self.held()))

    def begin_with(self, joined: Joined, at: int) -> None:
        """Begin all slots with parts of which this layer's have the number `at`."""
        layers = [run.layers[at] for run in joined.runs]
        runs = [layer for layer in layers if isinstance(layer, KeysValues)]
        self.keys = _taken([run.keys for run in runs], joined.index)
        self.values = _taken([run.values for run in runs], joined.index)

    @property
    def bytes_per_position(self) -> int:
        """What a further position of a slot takes; known behind the first step."""
        return sum(array.nbytes // (array.shape[0] * array.shape[2]) for array in self.held())

    @property
    def bytes_per_slot(self) -> int:
        """Nothing: it takes no more than its positions."""
        return 0


def _empty(like: mx.array, capacity: int, slots: int | None = None) -> mx.array:
    batch, heads, _, dim = like.shape
    return mx.zeros((slots or batch, heads, capacity, dim), dtype=like.dtype)


def _resized(buffer: mx.array, kept: Sequence[int], slots: int, capacity: int) -> mx.array:
    if list(kept) != list(range(buffer.shape[0])):
        buffer = buffer[mx.array(list(kept), dtype=mx.int32)]
    buffer = buffer[:, :, :capacity]
    missing = (slots - buffer.shape[0], capacity - buffer.shape[2])
    return mx.pad(buffer, [(0, missing[0]), (0, 0), (0, missing[1]), (0, 0)])


def _taken(runs: Sequence[mx.array], index: mx.array) -> mx.array:
    """Take positions [S, T] of runs [KV, T, D], one behind the other; position 0 is blank."""
    joined = mx.concatenate([mx.zeros_like(runs[0][:, :1]), *runs], axis=1)
    return joined[mx.arange(joined.shape[0])[:, None], index[:, None]]
