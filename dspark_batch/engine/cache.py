"""Keys and values of all slots: left-aligned rows of different lengths."""

import mlx.core as mx

from dspark_batch.numerics.masks import ragged_causal

_STEP = 256  # positions; buffers grow by whole steps, so few shapes exist


class RaggedCache:
    """The cached tokens of every slot, for all layers of one model.

    A step writes its tokens behind each slot's length and changes no length; `keep` then says how
    many of them stay. What lies behind a slot's length is never visible and is overwritten by the
    next step, so a rollback moves no data.

    Attributes:
        lengths: [S] int32, cached tokens of each slot.
        capacity: positions per slot that the buffers have room for.
        layers: one `LayerCache` per layer; they go where mlx-lm models expect their caches.
    """

    def __init__(self, num_layers: int, slots: int) -> None:
        self.lengths = mx.zeros(slots, dtype=mx.int32)
        self.capacity = 0
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    def reserve(self, positions: int) -> None:
        """Make room for this many positions per slot; keeps what is cached."""
        if positions <= self.capacity:
            return
        self.capacity = -(-positions // _STEP) * _STEP
        for layer in self.layers:
            layer.grow(self.capacity)

    def keep(self, counts: mx.array) -> None:
        """Let the first counts[s] tokens of the last step stay in slot s; [S] int32."""
        self.lengths = self.lengths + counts

    def insert(self, slot: int, row: "RaggedCache", length: int) -> None:
        """Replace a slot by the only slot of `row`, of which `length` positions are cached."""
        self.reserve(length)
        for mine, other in zip(self.layers, row.layers, strict=True):
            mine.insert(slot, other, length)
        self.lengths = _set(self.lengths, slot, length)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.lengths = _set(self.lengths, slot, 0)

    def arrays(self) -> list[mx.array]:
        """List the arrays to evaluate after a step, so that no graph grows over rounds."""
        buffers = [a for layer in self.layers for a in (layer.keys, layer.values) if a is not None]
        return [self.lengths, *buffers]


class LayerCache:
    """One layer's buffers, [S, KV, capacity, D] each; shares its owner's lengths.

    Offers what mlx-lm's models use of a cache: `offset`, `update_and_fetch`, `make_mask`.
    """

    def __init__(self, owner: RaggedCache) -> None:
        self._owner = owner
        self.keys: mx.array | None = None  # None: nothing written yet
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """The position of each slot's next token, [S] int32."""
        return self._owner.lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [S, KV, T, D] behind each slot's length; return both whole buffers.

        Raises:
            ValueError: the buffers have no room reserved for the step; only what the host knows
                of lengths can be checked, so the caller reserves.
        """
        if self.keys is None:
            self.keys = _empty(keys, self._owner.capacity)
            self.values = _empty(values, self._owner.capacity)
        position = self._owner.lengths[:, None] + mx.arange(keys.shape[2])
        index = position[:, None, :, None]
        self.keys = mx.put_along_axis(self.keys, index, keys, axis=2)
        self.values = mx.put_along_axis(self.values, index, values, axis=2)
        return self.keys, self.values

    def make_mask(
        self, width: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Build the causal mask of a step; see `numerics.masks.ragged_causal`."""
        return ragged_causal(self._owner.lengths, width, self._owner.capacity, window_size)

    def grow(self, capacity: int) -> None:
        """Extend the buffers to `capacity` positions."""
        if self.keys is not None:
            self.keys, self.values = _padded(self.keys, capacity), _padded(self.values, capacity)

    def insert(self, slot: int, other: "LayerCache", length: int) -> None:
        """Copy the first positions of `other`'s only slot over a slot of mine.

        Zeros follow: a masked position has weight 0, and 0 times the NaN of a former owner is NaN.
        """
        if other.keys is None:  # nothing was written, so nothing of it will be read
            return
        if self.keys is None:
            slots = self._owner.lengths.shape[0]
            self.keys = _empty(other.keys, self._owner.capacity, slots)
            self.values = _empty(other.values, self._owner.capacity, slots)
        self.keys[slot], self.values[slot] = 0, 0
        self.keys[slot, :, :length] = other.keys[0, :, :length]
        self.values[slot, :, :length] = other.values[0, :, :length]


def _empty(like: mx.array, capacity: int, slots: int | None = None) -> mx.array:
    batch, heads, _, dim = like.shape
    return mx.zeros((slots or batch, heads, capacity, dim), dtype=like.dtype)


def _padded(buffer: mx.array, capacity: int) -> mx.array:
    missing = capacity - buffer.shape[2]
    return mx.pad(buffer, [(0, 0), (0, 0), (0, missing), (0, 0)])


def _set(lengths: mx.array, slot: int, length: int) -> mx.array:
    return mx.where(mx.arange(lengths.shape[0]) == slot, length, lengths)
