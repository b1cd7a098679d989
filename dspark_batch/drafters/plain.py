"""No drafter, as a drafter: it drafts nothing, and every round commits one token."""

import mlx.core as mx

from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.drafters.drafter import Choose, Draft


class NoDrafter:
    """A drafter with draft length 0."""

    block_size = 0
    tap_ids: tuple[int, ...] = ()
    has_confidence = False
    num_layers = 0

    def make_cache(self, slots: int, positions: int) -> SlotCache:
        """Make a context of no layers."""
        return SlotCache((), slots, positions)

    def extend(self, context: SlotCache, features: mx.array | None) -> None:
        """Take no notice of the features."""

    def propose(
        self, anchor: mx.array, context: SlotCache, num_drafts: int, choose: Choose
    ) -> Draft:
        """Draft nothing: tokens [B, 0]."""
        return Draft(mx.zeros((anchor.shape[0], 0), dtype=anchor.dtype))
