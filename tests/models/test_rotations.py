"""Rotations whose angles the layers of a step share have the bits of MLX's own."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from dspark_batch.models import rotations
from dspark_batch.models.rotations import share_angles
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.pair import load_pair

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="a GPU rotates by a kernel"
)


class Layers(nn.Module):
    def __init__(self, *ropes):
        super().__init__()
        self.ropes = list(ropes)


def shared(**settings):
    rope = nn.RoPE(**settings)
    share_angles(Layers(rope))
    return rope


def vectors(heads, width, dim, dtype=mx.float32, slots=3):
    drawn = mx.random.normal((slots, width, heads, dim), key=mx.random.key(heads))
    return drawn.astype(dtype).transpose(0, 2, 1, 3)  # as they lie in a layer


def same_bits(one, other):
    return one.shape == other.shape and mx.array_equal(one.view(mx.uint8), other.view(mx.uint8))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("settings", [{}, {"base": 1e6}, {"scale": 0.25}])
def test_bits_are_those_of_mlx(settings, dtype):
    settings = {"dims": 16, **settings}
    rope, plain = shared(**settings), nn.RoPE(**settings)
    for offset in (mx.array([0, 5, 1999]), mx.array([1, 6, 2000])):
        for heads, width in [(4, 8), (2, 8), (2, 7), (1, 1)]:
            x = vectors(heads, width, 16, dtype)
            assert same_bits(rope(x, offset=offset), plain(x, offset=offset))


def test_layers_with_other_angles_do_not_take_each_others():
    ropes = [shared(dims=16), shared(dims=16, base=1e6), shared(dims=16, scale=2.0)]
    ropes.append(shared(dims=8))
    offset = mx.array([3, 40, 500])
    for _ in range(2):
        for rope in ropes:
            x = vectors(2, 8, rope.dims)
            plain = nn.RoPE(rope.dims, base=rope.base, scale=rope.scale)
            assert same_bits(rope(x, offset=offset), plain(x, offset=offset))


@pytest.mark.parametrize(
    ("x", "offset"),
    [
        (vectors(2, 8, 24), mx.array([1, 2, 3])),  # only a part of a vector is rotated
        (vectors(2, 8, 16), 5),
        (vectors(2, 8, 16), mx.array(5)),
        (vectors(2, 8, 16)[:, 0], mx.array([1, 2, 3])),
    ],
)
def test_whatever_else_rotates_as_mlx_does(x, offset):
    assert same_bits(shared(dims=16)(x, offset=offset), nn.RoPE(16)(x, offset=offset))


def test_rotations_of_other_kinds_stay():
    layers = Layers(nn.RoPE(16, traditional=True), nn.RoPE(16))
    share_angles(layers)
    assert [type(rope) is nn.RoPE for rope in layers.ropes] == [True, False]


def test_a_newcomers_positions_are_its_own():
    """Drafts behind a change of who sits in a slot do not take the angles of before."""
    drafter, fresh = load_pair("tiny").drafter, load_pair("tiny").drafter.make_cache(2, 64)
    context, other = drafter.make_cache(2, 64), drafter.make_cache(2, 64)
    features = mx.random.normal((2, 30, 3 * 320), key=mx.random.key(1))
    for cache in (context, other, fresh):
        drafter.extend(cache, features)
    context.keep(mx.array([20, 20]))
    other.keep(mx.array([30, 30]))
    fresh.keep(mx.array([20, 30]))

    def drafted(cache):
        draft = drafter.propose(
            mx.array([5, 6]), cache, 7, lambda logits, k, among: logits.argmax(-1)
        )
        return draft.logits

    drafted(context)
    context.insert([1], other, [1], [30])
    assert mx.array_equal(drafted(context), drafted(fresh))
    context.clear([0])
    fresh.lengths = mx.array([0, 30])
    assert mx.array_equal(drafted(context), drafted(fresh))


def test_passes_of_mlx_lm_rotate_as_they_did():
    """Its batches count their positions in place: the same array, with other numbers in it."""
    rope, offset, x = shared(dims=16), mx.array([1, 2, 3]), vectors(2, 1, 16)
    with as_they_come():
        for _ in range(2):
            assert same_bits(rope(x, offset=offset), nn.RoPE(16)(x, offset=offset))
            offset += 1


def test_the_layers_of_a_pair_share(monkeypatch):
    """A pass computes angles once, however many layers it has."""
    pair, asked = load_pair("tiny"), []
    monkeypatch.setattr(rotations, "_plain", lambda rope, x, offset: asked.append(1) or x)
    cache, context = pair.target.make_cache(2, 64), pair.drafter.make_cache(2, 64)
    _, features = pair.target(mx.zeros((2, 8), mx.int32), cache)
    assert len(asked) == 1
    pair.drafter.extend(context, features)
    assert len(asked) == 2
    pair.drafter.propose(
        mx.zeros(2, mx.int32), context, 7, lambda logits, k, among: logits.argmax(-1)
    )
    assert len(asked) == 3
