"""Layers with joined products, where a CPU stands in for the kernels that a GPU would run."""

import mlx.core as mx
import pytest
from mlx_lm.models import activations, llama, qwen3
from mlx_lm.models.cache import make_prompt_cache

from dspark_batch import device
from dspark_batch.caches import positions
from dspark_batch.caches.positions import PositionCache
from dspark_batch.caches.slot_cache import Extent
from dspark_batch.drafters.drafter_config import DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.models import joined_layers
from dspark_batch.models.attention import let_caches_choose
from dspark_batch.models.joined_layers import join_draft_layers, join_layers
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.numerics.exponential import swiglu

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
    put = [
        mx.put_along_axis(a, index, b, axis=2) for a, b in zip(into, (keys, values), strict=True)
    ]
    return queries, *put


def gated(joined, total, rows, *, is_wide=False):
    gates, ups = mx.split(joined[:total], 2, axis=-1)
    silu = swiglu if is_wide else activations.swiglu
    return mx.take(silu(gates, ups), mx.arange(rows) % total, axis=0)


def add_and_normalise(left, right, weight, epsilon, total, rows):
    sums = left[:total] + right[:total]
    normalised = mx.fast.rms_norm(sums, weight, epsilon)
    return sums, mx.take(normalised, mx.arange(rows) % total, axis=0)


@pytest.fixture(params=[True, False])
def _stand_ins(monkeypatch, request):
    for function in (split_heads, gated, add_and_normalise):
        monkeypatch.setattr(joined_layers, function.__name__, function)
    monkeypatch.setattr(device, "is_cuda", lambda: True)
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


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("module", [qwen3, llama])
def test_joined(module):
    model = _model(module)
    tokens = mx.array([[1, 2, 3], [4, 5, 6]])
    expected = []
    extent, caches = _caches(model)
    for _ in range(2):
        expected.append(_run(model, caches, tokens))
        extent.lengths = extent.lengths + 2
    plain = model(tokens, cache=make_prompt_cache(model))
    assert join_layers(model.layers, model.model.norm) == 3
    extent, caches = _caches(model)
    for i in range(2):
        assert mx.array_equal(_run(model, caches, tokens), expected[i])
        extent.lengths = extent.lengths + 2
    assert mx.array_equal(model(tokens, cache=make_prompt_cache(model)), plain)


def _drafter():
    config = DrafterConfig.from_dict(
        {
            "architectures": ["Qwen3DSparkModel"],
            **SIZES,
            "block_size": 3,
            "target_layer_ids": [0],
            "mask_token_id": 31,
            "num_target_layers": 3,
            "markov_rank": 8,
            "markov_head_type": "vanilla",
            "enable_confidence_head": False,
        }
    )
    drafter = DSparkDrafter(config)
    drafter.set_dtype(mx.bfloat16)
    mx.eval(drafter.parameters())
    make_rows_safe(drafter)
    return drafter


def _drafted(drafter):
    context = drafter.make_cache(2, 64)
    found = []
    for i in range(3):
        features = mx.random.normal((2, 2, 512), key=mx.random.key(i)).astype(mx.bfloat16)
        drafter.extend(context, features)
        context.keep(mx.array([1, 2], dtype=mx.int32))
        draft = drafter.propose(mx.array([1, 2]), context, 3, lambda x, k: mx.argmax(x, axis=-1))
        found += [draft.tokens, draft.logits]
        mx.eval(found, context.arrays())
    return found


@pytest.mark.usefixtures("_stand_ins")
def test_joined_drafter():
    drafter = _drafter()
    expected = _drafted(drafter)
    assert join_draft_layers(drafter.layers, drafter.norm) == 3
    found = _drafted(drafter)
    assert all(mx.array_equal(*pair) for pair in zip(expected, found, strict=True))
