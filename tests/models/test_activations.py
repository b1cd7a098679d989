"""A target's activation is ours in our passes, and mlx-lm's own in those of mlx-lm."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations as theirs
from mlx_lm.models.activations import swiglu

from dspark_batch.models import activations
from dspark_batch.models.activations import make_activations_fast
from dspark_batch.numerics import exponential
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.pair import load_pair

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="a GPU has fast exponentials"
)


class Mlp(nn.Module):
    def __call__(self, gate, up):
        return swiglu(gate, up)


class Other(nn.Module):
    def __call__(self, gate, up):
        swiglu = mx.add
        return swiglu(gate, up)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.other = Mlp(), Other()


def test_only_modules_that_call_mlx_lms_swiglu_change():
    model = Whole()
    make_activations_fast(model)
    assert type(model.mlp) is not Mlp
    assert (type(model), type(model.other)) == (Whole, Other)


def test_passes_of_mlx_lm_compute_what_they_computed():
    model, gate = Whole(), mx.random.normal((7, 33), key=mx.random.key(1)) * 4
    make_activations_fast(model)
    ours = model.mlp(gate, gate)
    with as_they_come():
        assert mx.array_equal(model.mlp(gate, gate), theirs.swiglu(gate, gate))
    assert mx.array_equal(ours, exponential.swiglu(gate, gate))
    assert mx.allclose(ours, theirs.swiglu(gate, gate), rtol=1e-5)


def test_the_bundled_targets_mlps_are_fast():
    for layer in load_pair("tiny").target.model.layers:
        assert type(layer.mlp).__call__.__globals__["swiglu"] is activations.swiglu
