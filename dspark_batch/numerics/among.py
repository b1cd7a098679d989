"""Logits over some tokens of a vocabulary only, as a drafter of a reduced one has them."""

from typing import NamedTuple

import mlx.core as mx


class Among(NamedTuple):
    """Some tokens of a vocabulary."""

    ids: mx.array  # [n], rising
    vocab_size: int

    def named(self, chosen: mx.array) -> mx.array:
        """Give the ids [...] of tokens that were chosen by their place [...] among these."""
        return self.ids[chosen]

    def spread(self, logits: mx.array) -> mx.array:
        """Map logits [..., n] to [..., V]; other tokens get -inf."""
        whole = mx.full((*logits.shape[:-1], self.vocab_size), -mx.inf, dtype=logits.dtype)
        return mx.put_along_axis(whole, mx.broadcast_to(self.ids, logits.shape), logits, axis=-1)
