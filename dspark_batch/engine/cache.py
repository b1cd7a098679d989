"""Keys and values of all slots: left-aligned, of different lengths."""

from collections.abc import Sequence
from typing import Self, TypeAlias

import mlx.core as mx

from dspark_batch.numerics.attention import BLOCK
from dspark_batch.numerics.masks import ragged_causal

# Runs of positions, one behind the other: keys, values of each layer in turn, [KV, T, D].
Parts: TypeAlias = Sequence[Sequence[mx.array]]


def whole_steps(positions: int) -> int:
    """Round up to the capacity that buffers for so many positions have."""
    return -(-positions // BLOCK) * BLOCK


class _Extent:
    """What all layers share: how far the slots are, and how far they may go."""

    def __init__(self, slots: int) -> None:
        self.lengths = mx.zeros(slots, dtype=mx.int32)
        self.capacity = 0


class RaggedCache:
    """The cached tokens of every slot, for all layers of one model.

    A step writes its tokens behind each slot's length and changes no length; `keep` then says how
    many of them stay. What lies behind a slot's length is never visible and is overwritten by the
    next step, so a rollback moves no data.

    Attributes:
        layers: one `LayerCache` per layer; they go where mlx-lm models expect their caches.
    """

    def __init__(self, num_layers: int, slots: int) -> None:
        # Layers do not know this object: a cycle would keep dead buffers until Python looks for it.
        self._extent = _Extent(slots)
        self.layers = [LayerCache(self._extent) for _ in range(num_layers)]

    @classmethod
    def of(
        cls,
        lengths: mx.array,
        buffers: Sequence[mx.array],
        num_layers: int,
        capacity: int,
    ) -> Self:
        """Make a cache of arrays: `lengths` [S], and what `buffers` lists, which may be nothing."""
        cache = cls(num_layers, lengths.shape[0])
        cache.lengths = lengths
        cache._extent.capacity = capacity
        cache.replace(buffers)
        return cache

    @property
    def lengths(self) -> mx.array:
        """Cached tokens of each slot, [S] int32."""
        return self._extent.lengths

    @lengths.setter
    def lengths(self, lengths: mx.array) -> None:
        self._extent.lengths = lengths

    @property
    def capacity(self) -> int:
        """Positions per slot that the buffers have room for."""
        return self._extent.capacity

    def reserve(self, positions: int) -> None:
        """Make room for this many positions per slot; keeps what is cached."""
        if positions > self.capacity:
            self._resize(list(range(self.lengths.shape[0])), self.lengths.shape[0], positions)

    def keep(self, counts: mx.array) -> None:
        """Let the first counts[s] tokens of the last step stay in slot s; [S] int32."""
        self.lengths = self.lengths + counts

    def resize(self, kept: Sequence[int], slots: int, positions: int) -> None:
        """Keep some slots, in this order, as the first of `slots`; the others are empty.

        `positions` is the room per slot; it must cover what the kept slots hold.
        """
        lengths = self.lengths[mx.array(kept, dtype=mx.int32)]
        self._resize(kept, slots, positions)
        self.lengths = mx.pad(lengths, (0, slots - len(kept)))

    def insert(
        self,
        slots: Sequence[int],
        other: "RaggedCache",
        chosen: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Replace slots by chosen ones of another cache, which hold lengths[i] positions."""
        self.reserve(max(lengths))
        where = mx.array(slots)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.insert(where, theirs, chosen, self.capacity)
        self.lengths[where] = mx.array(lengths)

    def clear(self, slots: Sequence[int]) -> None:
        """Empty some slots."""
        self.lengths[mx.array(slots)] = 0

    def part(self, slot: int, start: int, stop: int) -> list[mx.array]:
        """Copy positions of a slot: keys, values of each layer in turn, [KV, stop - start, D]."""
        arrays = [mx.contiguous(a[slot, :, start:stop]) for a in self.buffers()]
        mx.eval(arrays)  # or they would hold the whole buffers
        return arrays

    def begin_with(
        self, beginnings: Sequence[Parts], lengths: Sequence[int], first: int = 0
    ) -> None:
        """Begin slots, for which room is reserved, with what `part` copied.

        Args:
            beginnings: for each slot the parts of its beginning, in order; none for an empty slot.
            lengths: the positions of each slot's parts together.
            first: of the arrays of a part that are this cache's.
        """
        self.lengths = mx.array(lengths, dtype=mx.int32)
        if not self.layers or not any(beginnings):
            return
        runs: list[Sequence[mx.array]] = []  # of all beginnings, each once, behind a blank position
        starts: dict[tuple[int, ...], int] = {}  # the parts of a beginning -> its first position
        keys = [tuple(map(id, parts)) for parts in beginnings]
        end = 1
        for key, parts, length in zip(keys, beginnings, lengths, strict=True):
            if key not in starts:
                starts[key] = end
                end += length
                runs += parts
        position = mx.arange(self.capacity)
        index = mx.array([starts[key] for key in keys])[:, None] + position
        index = mx.where(position < self.lengths[:, None], index, 0)[:, None]
        for at, layer in enumerate(self.layers):
            layer.keys = _taken([run[first + 2 * at] for run in runs], index)
            layer.values = _taken([run[first + 2 * at + 1] for run in runs], index)

    def arrays(self) -> list[mx.array]:
        """List the arrays to evaluate after a step, so that no graph grows over rounds."""
        return [self.lengths, *self.buffers()]

    def buffers(self) -> list[mx.array]:
        """List keys and values of each layer in turn, [S, KV, capacity, D]; none before a step."""
        return [a for layer in self.layers for a in (layer.keys, layer.values) if a is not None]

    def replace(self, buffers: Sequence[mx.array]) -> None:
        """Put other arrays in place of all that `buffers` lists."""
        if buffers:
            for layer, keys, values in zip(self.layers, buffers[::2], buffers[1::2], strict=True):
                layer.keys, layer.values = keys, values

    def _resize(self, kept: Sequence[int], slots: int, positions: int) -> None:
        self._extent.capacity = whole_steps(positions)
        for layer in self.layers:
            layer.resize(kept, slots, self.capacity)


class LayerCache:
    """One layer's buffers, [S, KV, capacity, D] each; shares the extent of its owner.

    Offers what mlx-lm's models use of a cache: `offset`, `update_and_fetch`, `make_mask`.
    """

    is_ragged = True  # attention over it is `numerics.attention.ragged_attention`

    def __init__(self, extent: _Extent) -> None:
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

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [S, KV, T, D] behind each slot's length; return both whole buffers.

        Raises:
            ValueError: the buffers have no room reserved for the step; only what the host knows
                of lengths can be checked, so the caller reserves.
        """
        if self.keys is None:
            self.keys = _empty(keys, self._extent.capacity)
            self.values = _empty(values, self._extent.capacity)
        position = self._extent.lengths[:, None] + mx.arange(keys.shape[2])
        index = position[:, None, :, None]
        self.keys = mx.put_along_axis(self.keys, index, keys, axis=2)
        self.values = mx.put_along_axis(self.values, index, values, axis=2)
        return self.keys, self.values

    def make_mask(
        self, width: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Build the causal mask of a step; see `numerics.masks.ragged_causal`."""
        return ragged_causal(self._extent.lengths, width, self._extent.capacity, window_size)

    def resize(self, kept: Sequence[int], slots: int, capacity: int) -> None:
        """Keep some slots, in this order, as the first of `slots`; zeros follow everywhere."""
        if self.keys is not None:
            self.keys = _resized(self.keys, kept, slots, capacity)
            self.values = _resized(self.values, kept, slots, capacity)

    def insert(
        self, slots: mx.array, other: "LayerCache", chosen: Sequence[int], capacity: int
    ) -> None:
        """Replace slots [n] by n chosen ones of `other`, whole.

        Zeros follow: a masked position has weight 0, and 0 times the NaN of a former owner is NaN.
        """
        if other.keys is None:  # nothing was written, so nothing of it will be read
            return
        if self.keys is None:
            self.keys = _empty(other.keys, capacity, self._extent.lengths.shape[0])
            self.values = _empty(other.values, capacity, self._extent.lengths.shape[0])
        self.keys[slots] = _resized(other.keys, chosen, len(chosen), capacity)
        self.values[slots] = _resized(other.values, chosen, len(chosen), capacity)


def _empty(like: mx.array, capacity: int, slots: int | None = None) -> mx.array:
    batch, heads, _, dim = like.shape
    return mx.zeros((slots or batch, heads, capacity, dim), dtype=like.dtype)


def _resized(buffer: mx.array, kept: Sequence[int], slots: int, capacity: int) -> mx.array:
    if list(kept) != list(range(buffer.shape[0])):
        buffer = buffer[mx.array(kept, dtype=mx.int32)]
    buffer = buffer[:, :, :capacity]
    missing = (slots - buffer.shape[0], capacity - buffer.shape[2])
    return mx.pad(buffer, [(0, missing[0]), (0, 0), (0, missing[1]), (0, 0)])


def _taken(runs: Sequence[mx.array], index: mx.array) -> mx.array:
    """Take positions [S, 1, T] of runs [KV, T, D], one behind the other; position 0 is blank."""
    joined = mx.concatenate([mx.zeros_like(runs[0][:, :1]), *runs], axis=1)
    return joined[mx.arange(joined.shape[0])[:, None], index]
