"""The slots: who sits where, and what is cached of them."""

from collections.abc import Sequence as ListLike

import mlx.core as mx

from dspark_batch.answers.sequence import Sequence
from dspark_batch.caches.slot_cache import whole_steps
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import Prefilled
from dspark_batch.engine.shapes import Shapes, common_len
from dspark_batch.pair import Pair
from dspark_batch.types import Item, Request


class Slots:
    """The sequences that decode together; a pass runs over all slots, the free ones too.

    There are as many slots as it takes to hold who is there, so their number and their room follow
    the load.

    Args:
        pair: target and drafter.
        shapes: the passes that may run.
        widest: of the first round: 1 + its draft length.
        state_positions: what a slot remembers beside its positions, in positions.

    Attributes:
        sequences: by slot; None: free.
        cache: the target's.
        context: the drafter's.
        anchors: [S] int32.
        changes: how often others than before sat in some slot.
    """

    def __init__(self, pair: Pair, shapes: Shapes, widest: int, state_positions: int = 0) -> None:
        self._shapes = shapes
        self._widest = widest
        self._state_positions = state_positions
        self._block_size = pair.drafter.block_size
        self.sequences: list[Sequence | None] = []
        self.cache = pair.target.make_cache(0, 0)
        self.context = pair.drafter.make_cache(0, 0)
        self.anchors = mx.zeros(0, dtype=mx.int32)
        self.changes = 0
        self._active: mx.array | None = None  # [S] bool; None: others sit there now

    @property
    def active(self) -> list[Sequence]:
        """The sequences, without the free slots."""
        return [sequence for sequence in self.sequences if sequence is not None]

    def fit(self, draft_length: int, unread: int = 0) -> None:
        """Get ready for rounds with so many drafts: slots that a pass runs over, and their room.

        Rounds that the host has not read may add so many tokens, `unread`, until then.
        """
        self._widest = 1 + draft_length
        longest = self._longest() + unread
        room = self._room(longest)
        for cache in (self.cache, self.context):
            cache.reserve(room)
        self.cache.see(longest + self._shapes.width(self._widest))
        self.context.see(room)

    def fit_next(self) -> None:
        """Get ready for drafts behind a round like those of `fit` that the host has not read."""
        self.context.reserve(self._room(self._longest() + self._widest))

    def has_room(self, draft_length: int, unread: int) -> bool:
        """Whether `fit` would move nothing."""
        room = self._longest() + unread + self._round_room(1 + draft_length)
        return room <= min(self.cache.capacity, self.context.capacity)

    def positions(self) -> mx.array:
        """Give the answer positions that the next round decides first, [S] int32."""
        prompts = [len(s.request.prompt_ids) if s else 1 for s in self.sequences]
        return self.cache.lengths - mx.array(prompts, dtype=mx.int32) + 1

    def width(self, num_drafts: int) -> int:
        """Say how wide the pass must be that verifies some drafts, at most those of `fit`."""
        return self._shapes.width(1 + num_drafts)

    def packed_counts(self, drafts: ListLike[int], width: int) -> list[int] | None:
        """Count the tokens of each slot that a pass has to run over; None: it runs over all.

        Args:
            drafts: of each slot, that may count.
            width: of the pass.
        """
        counts = [1 + count for count in drafts]
        packs = self._shapes.packs(sum(counts), len(counts) * width) and self.cache.may_pack
        return counts if packs else None

    def num_positions(self, requests: ListLike[Request], most_slots: int, shared: int = 0) -> int:
        """Count the cached positions that some requests need at most, in so many slots.

        `shared` are the first ones that all of them have in common.
        """
        slots = self._shapes.slots_for(min(len(requests), most_slots))
        longest = max(len(r.prompt_ids) + r.max_tokens for r in requests)
        room = self._room(longest + self._widest) + self._state_positions
        return slots * room - (slots - 1) * shared * self._shapes.share(len(requests))

    def has_seats(self, newcomers: ListLike[Sequence]) -> bool:
        """Whether `enter` would move nothing of those who are there."""
        num_free = self.sequences.count(None)
        if not self.active or len(newcomers) > num_free:
            return False
        longest = max(sequence.cached_len for sequence in newcomers)
        has_room = longest <= min(self.cache.capacity, self.context.capacity)
        now = self.cache.shared, self.context.shared
        return has_room and self._to_share(newcomers) == now

    def make_room_for(self, newcomers: ListLike[Sequence]) -> None:
        """Have slots for all who will enter one wave behind the other, and room for the longest.

        It may move those who are there, so the device has no round meanwhile.
        """
        needed = len(self.active) + len(newcomers)
        slots = max(self._shapes.slots_for(needed), len(self.sequences))
        is_forgotten = self.cache.shared > 0 and not self.active
        if slots > len(self.sequences) or is_forgotten:
            longest = max(sequence.cached_len for sequence in newcomers)
            self._resize(slots, max(self.cache.capacity, self._room(longest)))

    def enter(
        self, newcomers: ListLike[Sequence], filled: Prefilled, chosen: ListLike[int]
    ) -> None:
        """Give free slots to who has begun; newcomers[i] is slot chosen[i] of `filled`."""
        free = [slot for slot, sequence in enumerate(self.sequences) if sequence is None]
        slots = free[: len(newcomers)]
        lengths = [sequence.cached_len for sequence in newcomers]
        owner = next((n for n, s in enumerate(self.sequences) if s is not None), 0)
        shared = self._to_share(newcomers)
        for cache, positions in zip((self.cache, self.context), shared, strict=True):
            cache.share(positions, owner)
        self.cache.insert(slots, filled.cache, chosen, lengths)
        self.context.insert(slots, filled.context, chosen, lengths)
        # In a new array: who waits for the round that gave the old one waits for no more than that.
        first = mx.array([s.token_ids[-1] for s in newcomers], dtype=mx.int32)
        self.anchors = mx.put_along_axis(self.anchors, mx.array(slots), first, axis=0)
        for slot, sequence in zip(slots, newcomers, strict=True):
            sequence.seat()
            self.sequences[slot] = sequence
        self.changes += 1
        self._active = None

    def release(self, slots: ListLike[int]) -> None:
        """Free some slots."""
        if slots:
            self.cache.clear(slots)
            self.context.clear(slots)
        for slot in slots:
            self.sequences[slot] = None
        self._active = None

    def cancel(self, item: Item) -> list[Request]:
        """Free the slots of an item; return its requests."""
        sequences = [(n, s) for n, s in enumerate(self.sequences) if s]
        found = [(n, s.request) for n, s in sequences if s.request.item.is_same(item)]
        slots, requests = [n for n, _ in found], [request for _, request in found]
        self.release(slots)
        return requests

    @property
    def is_too_large(self) -> bool:
        """Whether nobody needs a good part of the slots or of their room."""
        active = self.active
        if not active:
            return False
        fewer = 4 * self._shapes.slots_for(len(active)) <= 3 * len(self.sequences)
        return fewer or 4 * whole_steps(self._room(self._longest())) <= self.cache.capacity

    def shrink(self) -> None:
        """Give back slots and room that nobody needs, if it is a good part of them."""
        if self.is_too_large:
            slots = self._shapes.slots_for(len(self.active))
            self._resize(slots, self._room(self._longest()))

    def expect(self, num_drafts: int) -> None:
        """Say what a round with so many drafts will keep, if it is known before."""
        if num_drafts == 0:
            self.cache.expect(self._are_active().astype(mx.int32))

    def keep(self, passes: Passes, accepted: mx.array, bonus: mx.array) -> None:
        """Move on: the anchor and the accepted drafts [S] stay, the bonus [S] is next."""
        counts = mx.where(self._are_active(), accepted + 1, 0)
        passes.keep(self.cache, counts)
        self.context.keep(counts)
        self.anchors = bonus

    def _are_active(self) -> mx.array:
        if self._active is None:
            self._active = mx.array([sequence is not None for sequence in self.sequences])
        return self._active

    def _longest(self) -> int:
        return max(sequence.cached_len for sequence in self.active)

    def _room(self, cached_len: int) -> int:
        """Say how many positions a slot needs for a round: the pass, or the drafter's block.

        The block always runs whole, and in some drafters the anchor stands in front of it.
        """
        return cached_len + self._round_room(self._widest)

    def _round_room(self, widest: int) -> int:
        return max(self._shapes.width(widest), 1 + self._block_size)

    def _to_share(self, newcomers: ListLike[Sequence]) -> tuple[int, int]:
        """Count the positions to keep once, of the target's cache and of the drafter's."""
        shared = self._shared_with(newcomers)
        # A context behind a fault or a rest may lack its beginning.
        is_known = all(s.is_served for s in (*newcomers, *self.active))
        return shared, shared if is_known else 0

    def _shared_with(self, newcomers: ListLike[Sequence]) -> int:
        """Count the positions to keep once: much more than now, or what is left of these.

        Each change moves all that is cached.
        """
        prompts = [s.request.prompt_ids for s in (*newcomers, *self.active)]
        now = self.cache.shared  # is common to all who are there, so one of them tells
        left = common_len(prompts[: len(newcomers) + 1])
        if 2 * left >= 3 * now and self._shapes.share(len(prompts)):
            shared = common_len(prompts)
            if 2 * shared >= 3 * now:
                return shared
        return min(left, now)

    def _resize(self, slots: int, room: int) -> None:
        kept = [slot for slot, sequence in enumerate(self.sequences) if sequence is not None]
        self.cache.resize(kept, slots, room)
        self.context.resize(kept, slots, room)
        where = mx.array(kept, dtype=mx.int32)
        self.anchors = mx.pad(self.anchors[where], (0, slots - len(kept)))
        self.sequences = [self.sequences[slot] for slot in kept] + [None] * (slots - len(kept))
        self.changes += 1
        self._active = None
