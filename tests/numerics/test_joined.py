"""The kernels between products against MLX's operations; only CUDA has them."""

import joined_ops
import mlx.core as mx
import numpy as np
import pytest

from dspark_batch.numerics import joined
from dspark_batch.numerics.joined import Heads

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="the kernels are CUDA's")

SHAPES = [(64, 8), (64, 1), (8, 1), (1, 8), (1, 1), (3, 100)]  # slots, tokens
KINDS = {
    "qwen3": Heads(32, 8, 128, 128, 1e6, 1.0, 1e-6),
    "small": Heads(9, 3, 64, 64, 1e5, 0.5, 1e-5),
    "partly turned": Heads(16, 4, 256, 64, 1e7, 1.0, 1e-6),
    "of context": Heads(0, 8, 128, 128, 1e6, 1.0, 1e-6),
}


def _random(*shape, seed=0, scale=3.0):
    numbers = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return mx.array(scale * numbers).astype(mx.bfloat16)


def _same(a, b):
    return mx.array_equal(a.view(mx.uint16), b.view(mx.uint16)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("slots_tokens", SHAPES)
def test_heads_have_the_bits_of_norm_and_rotation(kind, has_norms, slots_tokens):
    (slots, width), shape = slots_tokens, KINDS[kind]
    product = _random(slots * width + 3, (shape.heads + 2 * shape.kv_heads) * shape.dim)
    offsets = mx.arange(slots, dtype=mx.int32) * 37 % 900
    norms = (_random(shape.dim, seed=1), _random(shape.dim, seed=2)) if has_norms else None

    expected = joined_ops.split_heads(product, shape, offsets, width, norms=norms)
    found = joined.split_heads(product, shape, offsets, width, norms=norms)

    start = 0 if shape.heads else 1
    assert all(map(_same, expected[start:], found[start:]))


@pytest.mark.parametrize("start", [0, 256, 768])
def test_heads_go_into_the_cache_where_each_slot_ends(start):
    shape = KINDS["qwen3"]
    product = _random(16 * 8, 48 * 128)
    offsets = start + mx.arange(16, dtype=mx.int32) * 31 % 500
    before, cache = ([_random(16, 8, 512, 128, seed=seed) for seed in (3, 4)] for _ in range(2))

    expected = joined_ops.split_heads(product, shape, offsets, 8, into=before, start=start)
    found = joined.split_heads(product, shape, offsets, 8, into=cache, start=start)

    assert all(map(_same, expected, found))
    assert all(map(_same, cache, found[1:]))  # in place


@pytest.mark.parametrize(("count", "capacity"), [(256, 512), (512, 256), (384, 384)])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_slots_go_into_the_cache_and_zeros_behind_them(count, capacity, dim):
    others = tuple(_random(5, 3, count, dim, seed=seed) for seed in (1, 2))
    before, cache = (
        tuple(_random(16, 3, capacity, dim, seed=seed) for seed in (3, 4)) for _ in range(2)
    )
    where = mx.array([4, 0, 3], dtype=mx.int32), mx.array([15, 2, 0], dtype=mx.int32)

    expected = joined_ops.insert_slots(before, others, *where)
    found = joined.insert_slots(cache, others, *where)

    assert all(map(_same, expected, found))
    assert all(map(_same, cache, found))  # in place


@pytest.mark.parametrize("is_wide", [True, False])
def test_every_number_is_activated_with_the_same_bits(is_wide):
    numbers = mx.array(np.arange(1 << 16, dtype=np.uint16)).view(mx.bfloat16)
    numbers = mx.where(mx.isnan(numbers), mx.zeros_like(numbers), numbers).reshape(64, 1024)
    product = mx.concatenate([numbers, _random(64, 1024)], axis=-1)

    expected = joined_ops.gated(product, 64, 70, is_wide=is_wide)

    assert _same(expected, joined.gated(product, 64, 70, is_wide=is_wide))
    halves = mx.stack(mx.split(expected, 2, axis=-1))
    assert _same(halves, joined.gated(product, 64, 70, is_wide=is_wide, parts=2))


@pytest.mark.parametrize("size", [64, 320, 512, 576, 960, 1024, 2560, 3072, 4096, 5120, 8192])
def test_sums_are_normalised_with_the_same_bits(size):
    left, right, weight = _random(40, size), _random(40, size, seed=1), _random(size, seed=2)

    halves = mx.stack([right, _random(40, size, seed=3)])

    for added in right, halves:
        expected = joined_ops.add_and_normalise(left, added, weight, 1e-6, 37, 48)
        found = joined.add_and_normalise(left, added, weight, 1e-6, 37, 48)

        assert all(map(_same, expected, found))
