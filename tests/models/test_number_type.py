"""The number type is measured, not guessed, and the measurement leaves no trace."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from dspark_batch.models import number_type


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.embedding = nn.Embedding(4, 64)
        self.set_dtype(dtype)
        self.ran = []

    def __call__(self, tokens):
        self.ran.append(self.embedding.weight.dtype)
        return self.embedding(tokens)


def clock(seconds_by_dtype, model):
    """A clock that moves only while a step runs, by the time of its type."""
    now = [0.0]

    def read():
        now[0] += sum(seconds_by_dtype[dtype] for dtype in model.ran)
        model.ran.clear()
        return now[0]

    return read


@pytest.mark.parametrize(("float32_s", "expected"), [(1.0, "float32"), (3.0, "bfloat16")])
def test_the_faster_type_wins(monkeypatch, float32_s, expected):
    model = Model(mx.bfloat16)
    seconds = {mx.float32: float32_s, mx.bfloat16: 2.0}
    monkeypatch.setattr(number_type.time, "perf_counter", clock(seconds, model))
    assert number_type.fastest_dtype(model) == expected


def test_the_probe_leaves_the_weights_as_they_were():
    model = Model(mx.bfloat16)
    before = dict(tree_flatten(model.parameters()))
    number_type.fastest_dtype(model)
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[name], array) for name, array in before.items())
    assert all(after[name].dtype == array.dtype for name, array in before.items())


def test_weights_stored_in_float32_are_never_rounded():
    model = Model(mx.float32)
    assert number_type.fastest_dtype(model) == "float32"
    assert mx.bfloat16 not in model.ran


def test_quantised_weights_keep_their_type():
    model = Model(mx.float16)
    nn.quantize(model, group_size=64, bits=4)
    assert number_type.fastest_dtype(model) == "float16"
    assert model.ran == []
