"""What attention remembers: keys and values of every position, left-aligned, of ragged lengths.

Example: 64 slots begin with the same 1,500 tokens. Their keys and values lie in memory once, in
whole blocks of positions, and a slot's own buffer has what comes behind them.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Self
from weakref import ref

import mlx.core as mx

from dspark_batch import device
from dspark_batch.caches.slot_cache import Arrays, Extent, Joined
from dspark_batch.numerics.joined import fits_slots, insert_slots
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
    rollback moves no data. The buffers lack the positions of a beginning that all slots share.
    They are row-contiguous, and no other array shares their memory: a kernel may write into them.
    """

    is_ragged = True  # attention over it is `numerics.attention.ragged_attention`

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self.keys: mx.array | None = None  # None: nothing written yet
        self.values: mx.array | None = None
        self._beginning: KeysValues | None = None  # of all slots; None: they share none
        # Whole keys and values of the last step; None: `keys` and `values` are.
        self._fetched: tuple[ref[mx.array], ref[mx.array]] | None = None

    @property
    def offset(self) -> mx.array:
        """The position of each batch entry's next token, [S] int32; [R] of a packed step."""
        packing = self._extent.packing
        return self._extent.lengths if packing is None else packing.offset

    @property
    def lengths(self) -> mx.array:
        """Cached tokens of each slot, [S] int32."""
        return self._extent.lengths

    @property
    def num_seen(self) -> int:
        """How many positions of the buffers a step may see."""
        return self._extent.seen

    @property
    def start(self) -> int:
        """The first position in the buffers: behind the beginning that all slots share."""
        return self._beginning.keys.shape[1] if self._beginning else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [S, KV, T, D] behind each slot's length; return all positions of both.

        A packed step's are [R, KV, 1, D]. The caller has reserved the room. A beginning that slots
        share is in front of each one's own, in arrays that nobody computes unless they are read;
        see `split`.
        """
        keys, values = self.unpacked(keys), self.unpacked(values)
        if self.keys is None or self.values is None:
            self.keys = _empty(keys, self._own_capacity)
            self.values = _empty(values, self._own_capacity)
        position = self._extent.lengths[:, None] + self._extent.places(keys.shape[2])
        index = (position - self.start)[:, None, :, None]
        self.keys = mx.put_along_axis(self.keys, index, keys, axis=2)
        self.values = mx.put_along_axis(self.values, index, values, axis=2)
        if self._beginning is None:
            return self.keys, self.values
        keys = _in_front(self._beginning.keys, self.keys)
        values = _in_front(self._beginning.values, self.values)
        self._fetched = ref(keys), ref(values)  # or it would hold the buffers
        return keys, values

    def split(
        self, keys: mx.array, values: mx.array
    ) -> tuple[KeysValues | None, mx.array, mx.array]:
        """Say what of keys and values all slots share; None: nothing; and what each one has.

        Whoever made other arrays of those of `update_and_fetch` gets these back, whole. What a
        kernel left in place of `buffers` is what each slot has.
        """
        whole = [each() for each in self._fetched or ()]
        is_whole = bool(whole) and keys is whole[0] and values is whole[1]
        is_left = keys is self.keys and values is self.values
        if not (is_whole or is_left) or self.keys is None or self.values is None:
            return None, keys, values
        return self._beginning, self.keys, self.values

    def unpacked(self, rows: mx.array) -> mx.array:
        """Turn heads of a packed step's rows, [R, H, 1, D], into those of slots, [S, H, W, D].

        What another step has is that already.
        """
        packing = self._extent.packing
        return rows if packing is None else packing.unpacked(rows[:, :, 0]).swapaxes(1, 2)

    def packed(self, attended: mx.array) -> mx.array:
        """Undo `unpacked`."""
        packing = self._extent.packing
        return attended if packing is None else packing.packed(attended.swapaxes(1, 2))[:, :, None]

    def buffers(self) -> tuple[mx.array, mx.array] | None:
        """Give both buffers for a kernel that writes a step into them; None: MLX has to write.

        They begin with the position `start`.

        What the kernel leaves is to be held in their place. MLX would copy them while a kernel in
        flight reads them, which such a write does not disturb: it is behind what others read.
        Before the first step there are none yet, and MLX might make one of zeros for several
        layers.
        """
        if self.keys is None or self.values is None:
            return None
        if not device.launches_one_by_one():
            return None
        return self.keys, self.values

    def make_mask(
        self, width: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Build the causal mask of a step; see `numerics.masks.ragged_causal`.

        That of a packed step is for all places: attention is over these.
        """
        width = width if self._extent.packing is None else self._extent.packing.width
        return ragged_causal(self._extent.lengths, width, self._extent.capacity, window_size)

    def held(self) -> Arrays:
        """List keys and values, [S, KV, own capacity, D], and those shared; none before a step."""
        return self.left() + (self._beginning.arrays if self._beginning else [])

    def left(self) -> Arrays:
        """List keys and values alone: a step writes into them."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def hold(self, arrays: Arrays) -> None:
        """Put others in place of all; none before the first step."""
        self._beginning = KeysValues(*arrays[2:]) if arrays[2:] else None
        self.leave(arrays[:2])

    def leave(self, arrays: Arrays) -> None:
        """Put others in place of keys and values."""
        self.keys, self.values = arrays or (None, None)

    def keep(self, counts: mx.array) -> None:
        """Do nothing: the owner's lengths say it."""

    def clear(self, slots: mx.array) -> None:
        """Do nothing: the owner's lengths say it."""

    def share(self, positions: int, slot: int) -> None:
        """Keep the first positions of all slots once, those of a slot."""
        if self.keys is None or self.values is None or positions == self.start:
            return
        beginning = self.snapshot(slot, 0, positions) if positions else None
        slots = range(self.keys.shape[0])
        self.leave([mx.contiguous(each) for each in self._behind(positions, slots)])
        self._beginning = beginning

    def resize(self, kept: Sequence[int], slots: int) -> None:
        """Keep some slots, in this order, as the first of `slots`; zeros follow everywhere."""
        if not kept:  # nor is there anybody who shares
            self.hold([])
        if self.keys is not None and self.values is not None:
            self.keys = _resized(self.keys, kept, slots, self._own_capacity)
            self.values = _resized(self.values, kept, slots, self._own_capacity)

    def insert(self, slots: Sequence[int], other: Self, chosen: Sequence[int]) -> None:
        """Replace slots by chosen ones of `other`, whole.

        Zeros follow: a masked position has weight 0, and 0 times the NaN of a former owner is NaN.
        """
        # Where nothing was written, nothing of it will be read.
        if other.keys is None or other.values is None:
            return
        if self.keys is None or self.values is None:
            if self._extent.shared:
                self._beginning = other.snapshot(chosen[0], 0, self._extent.shared)
            self.keys = _empty(other.keys, self._own_capacity, self._extent.lengths.shape[0])
            self.values = _empty(other.values, self._own_capacity, self._extent.lengths.shape[0])
        if (into := self.buffers()) and fits_slots(*into):
            keys, values = other._behind(self.start, range(other.keys.shape[0]))
            where, which = (mx.array(list(each), dtype=mx.int32) for each in (slots, chosen))
            self.keys, self.values = insert_slots(into, (keys, values), which, where)
            return
        keys, values = other._behind(self.start, chosen)
        n, capacity = len(chosen), self._own_capacity
        self.keys = _replaced(self.keys, slots, _resized(keys, range(n), n, capacity))
        self.values = _replaced(self.values, slots, _resized(values, range(n), n, capacity))

    def snapshot(self, slot: int, start: int, stop: int) -> KeysValues:
        """Copy positions of a slot."""
        whole = self._behind(0, [slot])
        return KeysValues(*(mx.contiguous(each[0, :, start:stop]) for each in whole))

    def begin_with(self, joined: Joined, at: int) -> None:
        """Begin all slots with parts of which this layer's have the number `at`."""
        layers = [run.layers[at] for run in joined.runs]
        runs = [layer for layer in layers if isinstance(layer, KeysValues)]
        keys, values = [run.keys for run in runs], [run.values for run in runs]
        own, shared = joined.index[:, joined.shared :], joined.index[:1, : joined.shared]
        self.leave([_taken(keys, own), _taken(values, own)])
        if joined.shared:
            self._beginning = KeysValues(_taken(keys, shared)[0], _taken(values, shared)[0])

    @property
    def bytes_per_position(self) -> int:
        """What a further position of a slot takes; known behind the first step."""
        return sum(array.nbytes // (array.shape[0] * array.shape[2]) for array in self.left())

    @property
    def bytes_per_slot(self) -> int:
        """Nothing: it takes no more than its positions."""
        return 0

    def _behind(self, start: int, slots: Sequence[int]) -> Arrays:
        """List keys and values of some slots from a position on."""
        found = [_chosen(each, slots) for each in self.left()]
        if self._beginning is None or start >= self.start:
            return [each[:, :, start - self.start :] for each in found]
        pairs = zip(self._beginning.arrays, found, strict=True)
        return [_in_front(shared[:, start:], each) for shared, each in pairs]

    @property
    def _own_capacity(self) -> int:
        return self._extent.capacity - self.start


def _in_front(shared: mx.array, own: mx.array) -> mx.array:
    """Put positions [KV, P, D] in front of those of each slot, [S, KV, C, D]."""
    copies = mx.broadcast_to(shared[None], (own.shape[0], *shared.shape))
    return mx.concatenate([copies, own], axis=2)


def _empty(like: mx.array, capacity: int, slots: int | None = None) -> mx.array:
    batch, heads, _, dim = like.shape
    return mx.zeros((slots or batch, heads, capacity, dim), dtype=like.dtype)


def _chosen(buffer: mx.array, slots: Sequence[int]) -> mx.array:
    if list(slots) == list(range(buffer.shape[0])):
        return buffer
    return buffer[mx.array(list(slots), dtype=mx.int32)]


def _resized(buffer: mx.array, kept: Sequence[int], slots: int, capacity: int) -> mx.array:
    buffer = _chosen(buffer, kept)[:, :, :capacity]
    missing = (slots - buffer.shape[0], capacity - buffer.shape[2])
    return mx.pad(buffer, [(0, missing[0]), (0, 0), (0, missing[1]), (0, 0)])


def _replaced(buffer: mx.array, slots: Sequence[int], others: mx.array) -> mx.array:
    """Put others in place of some slots.

    A CPU scatters number by number; runs of neighbours it copies three to five times as fast.
    """
    if not device.is_cpu():
        buffer[mx.array(list(slots))] = others
        return buffer
    for start, stop in _runs(slots):
        first = slots[start]
        buffer[first : first + stop - start] = others[start:stop]
    return buffer


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Cut slots into runs of neighbours; where each begins among them, and ends."""
    steps = enumerate(pairwise(slots), 1)
    cuts = [0, *(at for at, (one, next_one) in steps if next_one != one + 1), len(slots)]
    return list(pairwise(cuts))


def _taken(runs: Sequence[mx.array], index: mx.array) -> mx.array:
    """Take positions [S, T] of runs [KV, T, D], one behind the other; position 0 is blank."""
    joined = mx.concatenate([mx.zeros_like(runs[0][:, :1]), *runs], axis=1)
    return joined[mx.arange(joined.shape[0])[:, None], index[:, None]]
