"""What a model remembers of all slots, made of layer caches of several kinds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

import mlx.core as mx

from dspark_batch import device
from dspark_batch.caches.packing import Packing
from dspark_batch.numerics.attention import BLOCK

Arrays: TypeAlias = list[mx.array]


def whole_steps(positions: int) -> int:
    """Round up to the capacity that buffers for so many positions have."""
    return -(-positions // BLOCK) * BLOCK


class Extent:
    """What all layers share: how far the slots are, and how far they may go."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.lengths = mx.zeros(slots, dtype=mx.int32)
        self.capacity = capacity
        self.shared = 0  # first positions, whole blocks, that are the same in all slots
        self.seen = capacity  # positions from here on are behind the next step of every slot
        self.expected: mx.array | None = None  # counts that `keep` will say; None: nobody knows
        self.packing: Packing | None = None  # of the step that runs; None: it has all tokens
        self._places: dict[int, mx.array] = {}

    def places(self, count: int) -> mx.array:
        """Give 0 to count - 1, the same array to all layers.

        What they compute of it is then the same, too, and a compiled pass computes it once.
        """
        if count not in self._places:
            self._places[count] = mx.arange(count)
        return self._places[count]


class LayerPart(Protocol):
    """What one layer remembers of a run of positions of one slot."""

    @property
    def arrays(self) -> Arrays:
        """All that it holds."""
        ...

    def cut(self, stop: int) -> "LayerPart | None":
        """Return what the layer remembered after the first `stop` positions; None: unknown."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """What a slot remembers of a run of positions; nothing changes it."""

    length: int  # positions
    layers: tuple[LayerPart | None, ...]  # None: not known at the end of this part

    @property
    def is_whole(self) -> bool:
        """Whether a slot can go on behind it."""
        return None not in self.layers

    @property
    def arrays(self) -> Arrays:
        """All arrays of all layers."""
        return [array for layer in self.layers if layer is not None for array in layer.arrays]

    def cut(self, stop: int) -> "Part":
        """Return its first `stop` positions."""
        if stop == self.length:
            return self
        return Part(stop, tuple(layer and layer.cut(stop) for layer in self.layers))

    def ending_like(self, other: "Part") -> "Part":
        """Complete it by what another part with the same end knows."""
        pairs = zip(self.layers, other.layers, strict=True)
        return Part(self.length, tuple(mine or theirs for mine, theirs in pairs))


@dataclass(frozen=True, slots=True)
class Joined:
    """The beginnings of all slots, each different one once, one behind the other."""

    runs: list[Part]
    index: mx.array  # [S, C] int32, into the positions of the runs; 0: none, 1: the first one
    ends: list[Part | None]  # the last part of each slot; None: it is empty
    shared: int  # positions that are the same in all slots; the first slot has them

    @classmethod
    def of(cls, beginnings: Sequence[Sequence[Part]], lengths: mx.array, extent: Extent) -> Self:
        """Join the parts of each slot's beginning, in order."""
        runs: list[Part] = []
        starts: dict[tuple[int, ...], int] = {}  # the parts of a beginning -> its first position
        keys = [tuple(map(id, parts)) for parts in beginnings]
        end = 1
        for key, parts in zip(keys, beginnings, strict=True):
            if key not in starts:
                starts[key] = end
                end += sum(part.length for part in parts)
                runs += parts
        position = mx.arange(extent.capacity)
        index = mx.array([starts[key] for key in keys])[:, None] + position
        index = mx.where(position < lengths[:, None], index, 0)
        ends = [parts[-1] if parts else None for parts in beginnings]
        return cls(runs, index, ends, extent.shared)


class LayerCache(Protocol):
    """What one layer remembers of all slots. Only its own file knows how its arrays lie.

    Attributes:
        is_ragged: whether our attention runs over it.
    """

    is_ragged: bool

    def held(self) -> Arrays:
        """List the arrays that a step begins with; none before the first one."""
        ...

    def left(self) -> Arrays:
        """List the arrays that a step has left, of which `keep` makes those that are held."""
        ...

    def hold(self, arrays: Arrays) -> None:
        """Put others in place of what `held` lists."""
        ...

    def leave(self, arrays: Arrays) -> None:
        """Put others in place of what `left` lists."""
        ...

    def keep(self, counts: mx.array) -> None:
        """Let the first counts[s] tokens of the last step have happened, the others not."""
        ...

    def clear(self, slots: mx.array) -> None:
        """Forget what some slots [n] held."""
        ...

    def share(self, positions: int, slot: int) -> None:
        """Keep the first positions once, which are those of a slot, and the same in all."""
        ...

    def resize(self, kept: Sequence[int], slots: int) -> None:
        """Keep some slots, in this order, as the first of `slots`, and have room as the extent."""
        ...

    def insert(self, slots: Sequence[int], other: Self, chosen: Sequence[int]) -> None:
        """Replace slots by chosen ones of another layer."""
        ...

    def snapshot(self, slot: int, start: int, stop: int) -> LayerPart:
        """Copy what a slot that is `stop` positions long remembers of those from `start` on."""
        ...

    def begin_with(self, joined: Joined, at: int) -> None:
        """Begin all slots with parts of which this layer's have the number `at`."""
        ...

    @property
    def bytes_per_position(self) -> int:
        """What a further position of a slot takes; known behind the first step."""
        ...

    @property
    def bytes_per_slot(self) -> int:
        """What a slot takes, however long it is; known behind the first step."""
        ...


MakeLayer: TypeAlias = Callable[[Extent], LayerCache]


class SlotCache:
    """The cached tokens of every slot, for all layers of one model.

    A step leaves its tokens behind each slot's length and changes no length; `keep` then says how
    many of them have happened. The others have not, bit for bit, whatever a layer remembers.

    Args:
        make_layers: one maker for each layer cache.
        slots: how many there are.
        positions: the room of each.

    Attributes:
        layers: they go where mlx-lm models expect their caches.
    """

    def __init__(self, make_layers: Sequence[MakeLayer], slots: int, positions: int = 0) -> None:
        # Layers do not know this object: a cycle would keep dead buffers until Python looks for it.
        self._extent = Extent(slots, whole_steps(positions))
        self.layers: list[LayerCache] = [make(self._extent) for make in make_layers]

    @property
    def lengths(self) -> mx.array:
        """Cached tokens of each slot, [S] int32."""
        return self._extent.lengths

    @lengths.setter
    def lengths(self, lengths: mx.array) -> None:
        self._extent.lengths = lengths
        self._extent.seen = self.capacity

    @property
    def capacity(self) -> int:
        """Positions per slot that there is room for."""
        return self._extent.capacity

    @property
    def shared(self) -> int:
        """The first positions, the same in all slots, that are kept once."""
        return self._extent.shared

    def share(self, positions: int, slot: int) -> None:
        """Keep the first positions of all slots once; 0: of each slot again.

        Args:
            positions: whole blocks; every slot that is not empty has more, and the same first ones.
            slot: one of these.
        """
        # An empty slot stands where its own positions begin.
        is_empty = self.lengths <= self.shared
        self.lengths = mx.where(is_empty, positions, self.lengths)
        self._extent.shared = positions
        for layer in self.layers:
            layer.share(positions, slot)

    def reserve(self, positions: int) -> None:
        """Make room for this many positions per slot; keeps what is cached."""
        if positions > self.capacity:
            self._resize(list(range(self.lengths.shape[0])), self.lengths.shape[0], positions)

    def see(self, positions: int) -> None:
        """Say where the next steps end at the latest, until lengths change: on a CPU none looks on.

        Buffers do not shrink each time that a long slot is free, but attention does.
        """
        if device.is_cpu():
            self._extent.seen = min(whole_steps(positions), self.capacity)

    @property
    def expected(self) -> mx.array | None:
        """What `expect` was told, [S] int32; None: nothing since the last `keep`."""
        return self._extent.expected

    def expect(self, counts: mx.array | None) -> None:
        """Say before a step what `keep` will say behind it; a layer may do with less work then."""
        self._extent.expected = counts

    @property
    def may_pack(self) -> bool:
        """Whether a step can leave out tokens of some slots: a recurrence needs all of a slot."""
        return all(layer.is_ragged for layer in self.layers)

    @contextmanager
    def packed(self, counts: Sequence[int], width: int) -> Iterator[Packing]:
        """Let a step run over the first counts[s] of `width` tokens of slot s, as tokens [R, 1].

        It leaves, for these tokens, what a step over all would leave.
        """
        self._extent.packing = Packing(counts, width, self.lengths)
        try:
            yield self._extent.packing
        finally:
            self._extent.packing = None

    def keep(self, counts: mx.array) -> None:
        """Let the first counts[s] tokens of the last step have happened in slot s; [S] int32."""
        self.lengths = self.lengths + counts
        for layer in self.layers:
            layer.keep(counts)
        self.expect(None)

    def resize(self, kept: Sequence[int], slots: int, positions: int) -> None:
        """Keep some slots, in this order, as the first of `slots`; the others are empty.

        `positions` is the room per slot; it must cover what the kept slots hold.
        """
        lengths = self.lengths[mx.array(list(kept), dtype=mx.int32)]
        if not kept:
            self._extent.shared = 0
        self._resize(kept, slots, positions)
        self.lengths = mx.pad(lengths, (0, slots - len(kept)), constant_values=self.shared)

    def insert(
        self, slots: Sequence[int], other: Self, chosen: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Replace slots by chosen ones of another cache, which hold lengths[i] positions.

        The chosen ones begin with what the slots here share.
        """
        self.reserve(max(lengths))
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.insert(slots, theirs, chosen)
        self._set_lengths(mx.array(list(slots)), mx.array(list(lengths), dtype=mx.int32))

    def clear(self, slots: Sequence[int]) -> None:
        """Empty some slots."""
        where = mx.array(list(slots))
        self._set_lengths(where, mx.full(where.shape, self.shared))
        for layer in self.layers:
            layer.clear(where)

    def snapshot(self, slot: int, start: int, stop: int) -> Part:
        """Copy what a slot that is `stop` positions long remembers of those from `start` on."""
        part = Part(stop - start, tuple(layer.snapshot(slot, start, stop) for layer in self.layers))
        mx.eval(part.arrays)  # or they would hold the buffers of all slots
        return part

    def begin_with(self, beginnings: Sequence[Sequence[Part]], shared: int = 0) -> None:
        """Begin all slots, for which room is reserved, with what `snapshot` copied.

        Args:
            beginnings: for each slot the parts of its beginning, in order, the last one whole;
                none for an empty slot.
            shared: as `share` has it, with the first slot as the one.
        """
        lengths = [sum(part.length for part in parts) for parts in beginnings]
        self.lengths = mx.array([max(shared, length) for length in lengths], dtype=mx.int32)
        self._extent.shared = shared
        if self.layers and any(beginnings):
            joined = Joined.of(beginnings, mx.array(lengths), self._extent)
            for at, layer in enumerate(self.layers):
                layer.begin_with(joined, at)

    @property
    def bytes_per_position(self) -> int:
        """What a further position of a slot takes; known behind the first step."""
        return sum(layer.bytes_per_position for layer in self.layers)

    @property
    def bytes_per_slot(self) -> int:
        """What a slot takes, however long it is; known behind the first step."""
        return sum(layer.bytes_per_slot for layer in self.layers)

    def arrays(self) -> Arrays:
        """List the arrays to evaluate after `keep`, so that no graph grows over rounds."""
        return [self.lengths, *(array for layer in self.layers for array in layer.held())]

    def held(self) -> list[Arrays]:
        """List the arrays of each layer that a step begins with, for a compiled pass."""
        return [layer.held() for layer in self.layers]

    def left(self) -> list[Arrays]:
        """List the arrays of each layer that a step has left, for a compiled pass."""
        return [layer.left() for layer in self.layers]

    def hold(self, lengths: mx.array, expected: mx.array | None, held: Sequence[Arrays]) -> None:
        """Begin as another cache whose lengths these are, what it expects, and what it held."""
        self.lengths = lengths
        self.expect(expected)
        for layer, arrays in zip(self.layers, held, strict=True):
            layer.hold(arrays)

    def leave(self, left: Sequence[Arrays]) -> None:
        """Be behind the step of another cache, whose `left` this is."""
        for layer, arrays in zip(self.layers, left, strict=True):
            layer.leave(arrays)

    def _set_lengths(self, slots: mx.array, lengths: mx.array) -> None:
        """Set lengths [n] of slots [n], in a new array: a step knows its positions by the array."""
        self.lengths = mx.put_along_axis(self.lengths, slots, lengths, axis=0)

    def _resize(self, kept: Sequence[int], slots: int, positions: int) -> None:
        self._extent.capacity = self._extent.seen = whole_steps(positions)
        for layer in self.layers:
            layer.resize(kept, slots)
