"""Products over safe rows by weights that lie otherwise than in the layers they are of.

Weights of several layers of one input lie in one; those of a long sum may lie in two halves. What
the layers have then is a part of it, or is made of it when it is read, so nothing is in memory
twice.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.models.safe_layers import name_of
from dspark_batch.numerics.joined import fits_gate
from dspark_batch.numerics.rows import (
    Product,
    are_as_they_come,
    in_halves,
    over_filled_rows,
    over_safe_rows,
    rows_needed,
    while_they_come,
)


class Matrix:
    """A product over safe rows, [..., K] by a weight [N, K]."""

    num_parts = 1  # that its sums have

    def __init__(self, weight: mx.array) -> None:
        self.weight, self._transposed = weight, weight.T
        mx.eval(self._transposed)  # or each pass would do so
        self.seen: list[mx.array] | None = None  # what is multiplied, while a verdict is found
        self._product = _product(weight)

    def rows(self, total: int) -> int:
        """Say how many rows it runs over; see `numerics.rows.rows_needed`."""
        return rows_needed(self._product, total)

    def filled(self, rows: mx.array, total: int) -> mx.array:
        """Multiply rows that are filled up already.

        Args:
            rows: [R, K], or in halves [2, R, K / 2].
            total: rows that there are.

        Returns:
            [R, N]; in halves [2, R, N], which `summed` adds.
        """
        self._note(rows[..., :total, :])
        return over_filled_rows(self._product, rows, total, self._multiply)

    def let_go(self) -> None:
        """Give the layer back a weight of its own, if it has none."""

    def __call__(self, hidden: mx.array) -> mx.array:
        """Multiply hidden [..., K]; [..., N]."""
        self._note(hidden)
        return over_safe_rows(self._product, hidden, self._multiply)

    def _note(self, hidden: mx.array) -> None:
        if self.seen is not None:
            self.seen.append(hidden.reshape(-1, hidden.shape[-1]))

    def _multiply(self, rows: mx.array) -> mx.array:
        return rows @ self._transposed


class Joined(Matrix):
    """A product of several linear layers of one input, whose weights become parts of one."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__(mx.concatenate([layer["weight"] for layer in layers]))
        self._layers, self.cuts = layers, [0]
        for layer in layers:
            start = self.cuts[-1]
            self.cuts.append(start + layer["weight"].shape[0])
            layer["weight"] = self.weight[start : self.cuts[-1]]
        self._parts = [layer["weight"] for layer in layers]
        mx.eval(self._parts)

    def without(self, number: int) -> Matrix:
        """Leave the first ones out."""
        return Matrix(self.weight[self.cuts[number] :])

    def parts(self, names: Sequence[str]) -> list[tuple[str, Matrix, int, int]]:
        """List for each layer its name, this product, and where in it the layer's part is."""
        bounds = zip(names, self.cuts, self.cuts[1:], strict=False)
        return [(name, self, start, stop) for name, start, stop in bounds]

    @property
    def is_current(self) -> bool:
        """Whether the layers still have the weights that were joined; training changes them."""
        pairs = zip(self._layers, self._parts, strict=True)
        return all(layer["weight"] is part for layer, part in pairs)


class Part(nn.Module):
    """Stands in for one of the layers that are joined: its part of the joined product."""

    def __init__(self, joined: Matrix, start: int, stop: int) -> None:
        super().__init__()
        self._joined, self._start, self._stop = joined, start, stop

    def __call__(self, hidden: mx.array) -> mx.array:
        """Multiply as the layer does."""
        return self._joined(hidden)[..., self._start : self._stop]


def product_of(layer: nn.Module) -> Matrix:
    """Make the product of a layer, in halves where that needs fewer rows."""
    halves = in_halves(_product(layer["weight"]))
    if halves is None or not fits_gate(layer["weight"].shape[1], parts=2):
        return Matrix(layer["weight"])
    return _InHalves(layer, halves)


def _product(weight: mx.array) -> Product:
    width, size = weight.shape
    return Product(name_of(weight.dtype), size, width)


def summed(sums: mx.array) -> mx.array:
    """Add the halves of sums [2, R, N]; those that have none stay as they are."""
    return sums if sums.ndim == 2 else sums[0] + sums[1]


class _InHalves(Matrix):
    """A product whose sums are added in two halves; see `numerics.rows.in_halves`.

    Its weight lies as [2, N, K / 2]. What stands in the layer for it is made when it is read.
    """

    num_parts = 2

    def __init__(self, layer: nn.Module, halves: Product) -> None:
        width, size = layer["weight"].shape
        laid = mx.contiguous(layer["weight"].reshape(width, 2, size // 2).swapaxes(0, 1))
        self._laid, self._transposed = laid, laid.swapaxes(-1, -2)
        mx.eval(self._transposed)
        layer["weight"] = self.weight = self._whole()
        self.seen = None
        self._product = halves
        self._layer, self._plain = layer, type(layer)
        layer.__class__ = type(self._plain.__name__, (self._plain,), {"__call__": self._call_of})

    def __call__(self, hidden: mx.array) -> mx.array:
        *batch, size = hidden.shape
        total = hidden.size // size
        rows = mx.take(hidden.reshape(total, size), mx.arange(self.rows(total)) % total, axis=0)
        added = self.filled(rows.reshape(len(rows), 2, -1).swapaxes(0, 1), total)
        return summed(added)[:total].reshape(*batch, -1)

    def let_go(self) -> None:
        self._layer.__class__ = self._plain
        self._layer["weight"] = self.weight

    @property
    def _call_of(self) -> Callable[[nn.Module, mx.array], mx.array]:
        """Make what the layer does when its model's own code calls it."""

        def call(layer: nn.Module, x: mx.array) -> mx.array:
            if layer["weight"] is not self.weight:  # somebody changed it
                result: mx.array = self._plain.__call__(layer, x)
                return result
            if are_as_they_come():
                return x @ while_they_come(self, self._whole).T
            return self(x)

        return call

    def _whole(self) -> mx.array:
        return self._laid.swapaxes(0, 1).reshape(self._laid.shape[1], -1)

    def _multiply(self, rows: mx.array) -> mx.array:
        return mx.contiguous(rows) @ self._transposed
