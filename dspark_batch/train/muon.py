"""Muon, with all matrices of a size in one product.

MLX's goes through one matrix after the other. A small drafter has 29: about a thousand kernels a
step, which were a quarter of its time on an H200.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
from mlx import optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

Tree: TypeAlias = dict[str, Any]  # of arrays

_MOST_NUMBERS = 1 << 24  # of matrices that go together; five arrays of them are in memory
_STEPS = 5
_ONCE, _CUBED, _TO_THE_FIFTH = 3.4445, -4.7750, 2.0315  # what a step makes of a singular value
_TINY = 1e-7


class Muon(optimizers.Muon):
    """Updates as `mlx.optimizers.Muon` does without decay, but for the last bits.

    Source:
        Jordan and others, "Muon: An optimizer for hidden layers in neural networks"; momentum,
        coefficients and the scale of an update are those of `mlx.optimizers.Muon`.
    """

    def __init__(self, rate: Callable[[mx.array], mx.array]) -> None:
        super().__init__(rate, weight_decay=0.0)

    def apply_gradients(self, gradients: Tree, parameters: Tree) -> Tree:
        """Update all matrices of a tree; every gradient is [M, N]."""
        if not gradients:  # of a drafter without layers
            return gradients
        moved: Tree = tree_map(self._moved, gradients, self.state)
        updated: Tree = super().apply_gradients(_orthogonal(moved), parameters)
        return updated

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """Move a matrix along its direction."""
        height, width = gradient.shape
        rate = self.learning_rate.astype(gradient.dtype) * max(1, height / width) ** 0.5
        return parameter - rate * gradient

    def _moved(self, gradient: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Follow the gradients of many steps, and this one's a little more."""
        state["v"] = self.momentum * state["v"] + (1 - self.momentum) * gradient
        return (1 - self.momentum) * gradient + self.momentum * state["v"]


def _orthogonal(tree: Tree) -> Tree:
    """Make all singular values of each matrix of a tree nearly 1."""
    flat: list[tuple[str, mx.array]] = list(dict(tree_flatten(tree)).items())
    sizes: dict[tuple[int, ...], list[int]] = {}
    for at, (_, matrix) in enumerate(flat):
        sizes.setdefault(tuple(sorted(matrix.shape)), []).append(at)
    together = [
        (height, places[at : at + count])
        for (height, width), places in sizes.items()
        for count in [max(1, _MOST_NUMBERS // (height * width))]
        for at in range(0, len(places), count)
    ]
    found: dict[int, mx.array] = {}
    for height, places in together:
        some = [flat[at][1] for at in places]
        wide = mx.stack([each if each.shape[0] == height else each.T for each in some])
        for at, each, one in zip(places, some, _all_ones(wide), strict=True):
            found[at] = one if each.shape[0] == height else one.T
    whole: Tree = tree_unflatten([(name, found[at]) for at, (name, _) in enumerate(flat)])
    return whole


def _all_ones(matrices: mx.array) -> mx.array:
    """Do so with matrices [G, M, N], M <= N, by five steps of Newton and Schulz."""
    found = matrices / (mx.sqrt((matrices * matrices).sum(axis=(1, 2), keepdims=True)) + _TINY)
    for _ in range(_STEPS):
        gram = found @ found.swapaxes(1, 2)
        odd = mx.addmm(gram, gram, gram, alpha=_TO_THE_FIFTH, beta=_CUBED)
        found = mx.addmm(found, odd, found, beta=_ONCE)
    return found
