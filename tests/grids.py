"""Grids of settings: each value runs with every change, each cell with the slow tests."""

from itertools import product

import pytest


def grid(*axes):
    """List all cells of a grid for `parametrize`.

    Example: of `grid("ab", "123")` the cells a1, b2 and a3 run often, and b1, a2 and b3 are slow.
    """
    often = {tuple(n % len(axis) for axis in axes) for n in range(max(map(len, axes)))}
    cells = []
    for cell in product(*(range(len(axis)) for axis in axes)):
        values = [axis[n] for axis, n in zip(axes, cell, strict=True)]
        marks = () if cell in often else pytest.mark.slow
        cells.append(pytest.param(*values, id="-".join(map(str, values)), marks=marks))
    return cells
