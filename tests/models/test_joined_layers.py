"""Layers with joined products, where a CPU stands in for the kernels that a GPU would run."""

import mlx.core as mx
import pytest
from mlx_lm.models import llama, qwen3

from dspark_batch.caches import positions
from dspark_batch.caches.slot_cache import Extent
from dspark_batch.caches.positions import PositionCache
from dspark_batch.models import joined_layers
from dspark_batch.models.attention import let_caches_choose
from dspark_batch.models.safe_layers import make_rows_safe

SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
}


def split_heads(joined, shape, offsets, width, *, norms=None, periods=None, into=None):
    batch, dim = offsets.shape[0], shape.dim
    heads = joined[: batch * width].reshape(batch, width, -1, dim)
    ends = [shape.heads, shape.heads + shape.kv_heads]
    parts = mx.split(heads, ends, axis=2)
    for i in range(2):
        if norms:
            parts[i] = mx.fast.rms_norm(parts[i], norms[i], shape.epsilon)
    queries, keys, values = (part.transpose(0, 2, 1, 3) for part in parts)
    turn = {"traditional": False, "base": shape.base, "scale": shape.scale, "offset": offsets}
    queries, keys = (
        mx.fast.rope(each, shape.turned, freqs=periods, **turn) for each in (queries, keys)
    )
    if into is None:
        return queries, keys, values
    index = (offsets[:, None] + mx.arange(width))[:, None, :, None]
    put = [mx.put_along_axis(a, index, b, axis=2) for a, b in zip(into, (keys, values))]
    return queries, *put


def gated(joined, total, rows):
    gates, ups = mx.split(joined[:total], 2, axis=-1)
    return mx.take(gates * mx.sigmoid(gates) * ups, mx.arange(rows) % total, axis=0)


def add_and_normalise(left, right, weight, epsilon, total, rows):
    sums = left[:total] + right[:total]
    normalised = mx.fast.rms_norm(sums, weight, epsilon)
    return sums, mx.take(normalised, mx.arange(rows) % total, axis=0)


@pytest.fixture(params=[True, False])
def _stand_ins(monkeypatch, request):
    for function in (split_heads, gated, add_and_normalise):
        monkeypatch.setattr(joined_layers, function.__name__, function)
    monkeypatch.setattr(positions, "may_write_in_place", lambda: request.param)


def _model(module, **changes):
    args = module.ModelArgs.from_dict(
        {"model_type": module.__name__.split(".")[-1], **SIZES, **changes}
    )
    model = module.Model(args)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    make_rows_safe(model)
    let_caches_choose(model)
    return model


def _run(model, caches, tokens):
    logits = model(tokens, cache=caches)
    mx.eval(logits)
    return logits


def _caches(model):
    extent = Extent(2, 64)
    extent.lengths = mx.array([3, 0], dtype=mx.int32)
    return extent, [PositionCache(extent) for _ in model.layers]


@pytest.mark.parametrize("module", [qwen3, llama])
def test_joined(module, _stand_ins):
    model = _model(module)
    tokens = mx.array([[1, 2, 3], [4, 5, 6]])
    expected = []
    extent, caches = _caches(model)
    for _ in range(2):
        expected.append(_run(model, caches, tokens))
        extent.lengths = extent.lengths + 2
    own = model.make_cache() if hasattr(model, "make_cache") else None
    plain = model(tokens, cache=own)
    assert joined_layers.join_layers(model.layers, model.model.norm) == 3
    extent, caches = _caches(model)
    for i in range(2):
        assert mx.array_equal(_run(model, caches, tokens), expected[i])
        extent.lengths = extent.lengths + 2
    assert mx.array_equal(model(tokens, cache=own), plain)
