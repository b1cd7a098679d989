"""A target: an mlx-lm model, unmodified, whose layers are tapped."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.models.taps import Taps


class LayerCache(Protocol):
    """What mlx-lm's models use of a cache."""

    offset: mx.array  # [B] int32, positions of the next tokens

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the step's keys and values; return all that the step may look at."""

    def make_mask(
        self, width: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Say which positions the step's tokens may look at."""


class Target:
    """The model whose text is wanted.

    Args:
        model: from mlx-lm.
        tap_ids: layers whose outputs the drafter reads; empty for none.
    """

    def __init__(self, model: nn.Module, tap_ids: Sequence[int] = ()) -> None:
        self.model = model
        self._taps = Taps(model.layers, tap_ids)

    @property
    def num_caches(self) -> int:
        """How many layers keep keys and values."""
        make_cache = getattr(self.model, "make_cache", None)
        return len(make_cache()) if make_cache else len(self.model.layers)

    def __call__(
        self, tokens: mx.array, caches: Sequence[LayerCache]
    ) -> tuple[mx.array, mx.array | None]:
        """Run one step over tokens [B, T].

        Returns:
            Logits [B, T, V] and the tapped features [B, T, m*E]; None without taps.
        """
        logits = self.model(tokens, cache=list(caches))
        return logits, self._taps.take()
