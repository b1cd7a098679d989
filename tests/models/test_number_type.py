"""The number type is a rule: the same weights on the same kind of device have the same one."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from dspark_batch.models import number_type
from dspark_batch.models.number_type import stored_dtype, usual_dtype


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.embedding = nn.Embedding(4, 64)
        self.set_dtype(dtype)


@pytest.fixture
def device(request, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(request.param))


STORED = [mx.float32, mx.bfloat16, mx.float16]


@pytest.mark.parametrize("device", [mx.cpu], indirect=True)
@pytest.mark.parametrize("dtype", STORED)
def test_on_a_cpu_it_is_float32(device, dtype):
    assert usual_dtype(Model(dtype)) == "float32"


@pytest.mark.parametrize("device", [mx.gpu], indirect=True)
@pytest.mark.parametrize("dtype", STORED)
def test_on_a_gpu_weights_stay_as_they_are_stored(device, dtype):
    assert usual_dtype(Model(dtype)) == str(dtype).removeprefix("mlx.core.")


@pytest.mark.parametrize("device", [mx.cpu], indirect=True)
def test_large_weights_stay_as_they_are_stored(device, monkeypatch):
    model = Model(mx.bfloat16)
    size = model.embedding.weight.nbytes
    monkeypatch.setattr(number_type, "_LARGE_BYTES", size)
    assert usual_dtype(model) == "float32"
    monkeypatch.setattr(number_type, "_LARGE_BYTES", size - 1)
    assert usual_dtype(model) == "bfloat16"


@pytest.mark.parametrize("device", [mx.cpu], indirect=True)
def test_quantised_weights_get_float32_scales_however_large_they_are(device, monkeypatch):
    monkeypatch.setattr(number_type, "_LARGE_BYTES", 0)
    model = Model(mx.float16)
    nn.quantize(model, group_size=64, bits=4)
    assert stored_dtype(model) == "float16"
    assert usual_dtype(model) == "float32"


@pytest.mark.parametrize("device", [mx.cpu], indirect=True)
def test_weights_that_are_quantised_as_they_load_get_float32_scales_too(device, monkeypatch):
    monkeypatch.setattr(number_type, "_LARGE_BYTES", 0)
    assert usual_dtype(Model(mx.float16)) == "float16"
    assert usual_dtype(Model(mx.float16), is_to_be_quantised=True) == "float32"


def test_the_weights_are_only_looked_at():
    model = Model(mx.bfloat16)
    before = dict(tree_flatten(model.parameters()))
    usual_dtype(model)
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is array for name, array in before.items())
