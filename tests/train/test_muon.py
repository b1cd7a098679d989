"""All matrices of a size together: updates are those of MLX's Muon, which takes one at a time."""

import mlx.core as mx
import pytest
from mlx import optimizers
from mlx.utils import tree_flatten

from dspark_batch.train import muon
from dspark_batch.train.muon import Muon

SHAPES = {"wide": (6, 20), "again": (6, 20), "tall": (20, 6), "square": (6, 6), "odd": (5, 7)}


def drawn(seed):
    """Draw a matrix of each shape, two levels deep."""
    keys = mx.random.split(mx.random.key(seed), len(SHAPES))
    flat = {
        name: mx.random.normal(shape, key=key)
        for (name, shape), key in zip(SHAPES.items(), keys, strict=True)
    }
    return {"layers": [{name: flat[name]} for name in ("wide", "tall", "again")], "rest": flat}


def after_steps(optimizer, steps):
    parameters = drawn(1)
    optimizer.init(parameters)
    for step in range(steps):
        parameters = optimizer.apply_gradients(drawn(2 + step), parameters)
    return dict(tree_flatten(parameters))


@pytest.mark.parametrize(("steps", "most"), [(1, 10**6), (3, 10**6), (3, 240), (3, 1)])
def test_updates_are_those_of_mlx(steps, most, monkeypatch):
    monkeypatch.setattr(muon, "_MOST_NUMBERS", most)  # so that few, or one, go together

    def rate(step):
        return 0.1 / (1 + step)

    ours = after_steps(Muon(rate), steps)
    theirs = after_steps(optimizers.Muon(rate, weight_decay=0.0), steps)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert mx.allclose(ours[name], expected, rtol=1e-4, atol=1e-5), name
    assert not mx.allclose(ours["rest.wide"], drawn(1)["rest"]["wide"], atol=1e-2)
