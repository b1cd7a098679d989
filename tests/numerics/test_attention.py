"""Attention over a ragged cache, against float32; on CUDA that is our kernel."""

import mlx.core as mx
import pytest

from dspark_batch.numerics.attention import ragged_attention
from dspark_batch.numerics.masks import ragged_block, ragged_causal, windowed_block

ON_CUDA = mx.cuda.is_available()
ERROR = {mx.float32: 5e-3 if ON_CUDA else 1e-5, mx.bfloat16: 0.06}  # CUDA rounds to TF32


def causal(lengths, width, capacity):
    return ragged_causal(lengths, width, capacity)


def windowed(lengths, width, capacity):
    return ragged_causal(lengths, width, capacity, window=9)


def block(lengths, width, capacity):
    return ragged_block(lengths, width, capacity)


def own_past(lengths, width, capacity):
    settings = {"window": 20, "from_anchor": False, "causal": True}
    return windowed_block(lengths, width, capacity, **settings)


def right(queries, keys, values, scale, mask):
    keys, values = (
        mx.repeat(array.astype(mx.float32), queries.shape[1] // keys.shape[1], axis=1)
        for array in (keys, values)
    )
    scores = scale * (queries.astype(mx.float32) @ keys.swapaxes(-1, -2))
    return mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1) @ values


def drawn(dtype, *, heads, kv_heads, width, dim, capacity):
    slots = 5
    shapes = [(heads, width), (kv_heads, capacity), (kv_heads, capacity)]
    arrays = [
        mx.random.normal((slots, count, places, dim), key=mx.random.key(seed)).astype(dtype)
        for seed, (count, places) in enumerate(shapes)
    ]
    most = capacity - width
    return arrays, mx.array([0, 1, min(31, most), most // 2, most])


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("mask", [causal, windowed, block, own_past])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 6), (8, 1)])
@pytest.mark.parametrize(("width", "dim", "capacity"), [(1, 64, 64), (7, 128, 96), (40, 64, 160)])
def test_it_is_attention(dtype, mask, heads, kv_heads, width, dim, capacity):
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "dim": dim}
    arrays, lengths = drawn(dtype, **sizes, capacity=capacity)
    visible, scale = mask(lengths, width, capacity), dim**-0.5
    found = ragged_attention(*arrays, scale, visible, lengths)
    assert found.shape == arrays[0].shape
    assert mx.abs(found.astype(mx.float32) - right(*arrays, scale, visible)).max() < ERROR[dtype]


@pytest.mark.parametrize("bad", [mx.nan, mx.inf])
def test_what_is_no_number_stays_in_its_slot_and_is_seen_there(bad):
    arrays, lengths = drawn(mx.bfloat16, heads=4, kv_heads=2, width=3, dim=64, capacity=64)
    mask = ragged_causal(lengths, 3, 64)
    known = ragged_attention(*arrays, 0.125, mask, lengths)
    arrays[1][3, :, 2] = bad
    found = ragged_attention(*arrays, 0.125, mask, lengths)
    is_number = mx.isfinite(found).all(axis=(1, 2, 3)).tolist()
    assert is_number == [True, True, True, False, True]
    assert mx.array_equal(found[:3], known[:3])


@pytest.mark.skipif(not ON_CUDA, reason="products need not keep their bits")
def test_a_slots_bits_depend_on_that_slot_only():
    arrays, lengths = drawn(mx.bfloat16, heads=8, kv_heads=2, width=6, dim=128, capacity=128)
    known = ragged_attention(*arrays, 0.1, ragged_causal(lengths, 6, 128), lengths)
    longer = [mx.pad(array, [(0, 0), (0, 0), (0, 64), (0, 0)]) for array in arrays[1:]]
    mask = ragged_causal(lengths, 6, 192)
    assert mx.array_equal(ragged_attention(arrays[0], *longer, 0.1, mask, lengths), known)
    own = [array[3:4] for array in (*arrays, lengths)]
    mask = ragged_causal(own[3], 6, 128)
    assert mx.array_equal(ragged_attention(*own[:3], 0.1, mask, own[3]), known[3:4])
    first = [arrays[0][:, :, :1], *arrays[1:]]
    mask = ragged_causal(lengths, 1, 128)
    assert mx.array_equal(ragged_attention(*first, 0.1, mask, lengths), known[:, :, :1])
