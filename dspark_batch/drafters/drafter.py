"""What the engine needs of a drafter."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import mlx.core as mx

from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.numerics.among import Among

# How weights become drafts, which decide bytes by the rejection rule. Another way is another word.
DRAFTING = "a block has a place for each draft"

# Chooses the tokens [B] of block position k from logits [B, V], or [B, n] of some tokens only.
Choose = Callable[[mx.array, int, Among | None], mx.array]


class Draft(NamedTuple):
    """What a drafter proposes for each slot; K drafts."""

    tokens: mx.array  # [B, K] int32
    logits: mx.array | None = None  # [B, K, V or n], Markov bias included; None: there are none
    confidence: mx.array | None = None  # [B, K] float32 logits; None: no confidence head
    highest: mx.array | None = None  # [B] of all logits, NaN if one is NaN; None: there are none


class Drafter(Protocol):
    """Guesses what a target says next; a wrong guess costs time, and no token changes."""

    @property
    def block_size(self) -> int:
        """Most tokens that one pass drafts; 0: it never drafts."""
        ...

    @property
    def tap_ids(self) -> tuple[int, ...]:
        """Layers of the target whose outputs it reads; (): it reads nothing."""
        ...

    @property
    def has_confidence(self) -> bool:
        """Whether drafts come with confidence logits."""
        ...

    @property
    def num_layers(self) -> int:
        """How many layers it has."""
        ...

    def make_cache(self, slots: int, positions: int) -> SlotCache:
        """Make its context: what it remembers of committed positions, ragged over slots."""
        ...

    def extend(self, context: SlotCache, features: mx.array | None) -> None:
        """Write T further positions behind each slot's context, whose lengths stay.

        Args:
            context: written in place; the caller says how many positions hold.
            features: [B, T, m*E], the target's outputs at `tap_ids`; None: there are no taps.
        """
        ...

    def propose(
        self, anchor: mx.array, context: SlotCache, num_drafts: int, choose: Choose
    ) -> Draft:
        """Draft from the anchor [B], at most `block_size` tokens, each taken by `choose`."""
        ...
