"""Lets a target's head compute the logits of some positions of each slot: those that are read."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn


class NarrowHead:
    """Narrows what goes into a head, without changing the target's code.

    The head keeps its parameters and its place; its class becomes a one-off subclass. A row of a
    head has its bits by itself (`numerics.rows`), so the others need not be there.

    Args:
        head: a linear layer, or the embedding whose transpose is the head.
    """

    def __init__(self, head: nn.Module) -> None:
        self._positions: mx.array | None = None  # None: all
        self._shape: tuple[int, ...] = ()  # [B, T] of the step
        self.has_narrowed = False  # in the last `at`; else the model does not call this head
        plain, narrowed = type(head), self._narrowed

        name = "as_linear" if hasattr(plain, "as_linear") else "__call__"
        multiply = getattr(plain, name)

        def over_some(self: nn.Module, hidden: mx.array) -> mx.array:
            result: mx.array = multiply(self, narrowed(hidden))
            return result

        head.__class__ = type(plain.__name__, (plain,), {name: over_some})

    @contextmanager
    def at(self, positions: mx.array, shape: tuple[int, ...]) -> Iterator[None]:
        """Let a step over tokens [B, T] give the logits [B, P, V] of positions [B, P]."""
        self._positions, self._shape, self.has_narrowed = positions, shape, False
        try:
            yield
        finally:
            self._positions = None

    def _narrowed(self, hidden: mx.array) -> mx.array:
        if self._positions is None or hidden.shape[:-1] != self._shape:
            return hidden
        self.has_narrowed = True
        return mx.take_along_axis(hidden, self._positions[..., None], axis=1)
