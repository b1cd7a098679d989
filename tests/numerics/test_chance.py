"""The noise is noise, along every axis that it is keyed by, and the same everywhere."""

import mlx.core as mx
import numpy as np
import pytest
from chi_square import chi_square_excess

from dspark_batch.numerics.chance import Chance, gumbel, random_bits, uniform

BITS = {"high": 28, "low": 0}  # shift that leaves 4 bits in front


def uint32(*values):
    return mx.array(values, dtype=mx.uint32)


def grid(keys=1, positions=1, ids=1):
    """Random bits [keys, positions, ids] of small consecutive numbers, as jobs have them."""
    key = mx.stack([mx.full(keys, 7), mx.arange(keys)], axis=-1).astype(mx.uint32)
    where = mx.arange(positions)[None, :, None]
    return random_bits(key[:, None, None], where, mx.arange(ids, dtype=mx.uint32))


def chance(slots, positions=None):
    keys = mx.stack([mx.arange(slots), mx.arange(slots) + 9], axis=-1).astype(mx.uint32)
    return Chance(keys, mx.zeros(slots, mx.int32) if positions is None else mx.array(positions))


def test_the_bits_are_these_on_every_device_and_for_ever():
    keys = uint32(0x01234567, 0x89ABCDEF)
    bits = random_bits(keys, mx.array([[0], [1], [4095]]), uint32(0, 1, 151935))
    assert bits.tolist() == [
        [1817805654, 3166457434, 1060175795],
        [221157433, 3428077563, 479526419],
        [3554695829, 1388970105, 4138365582],
    ]


@pytest.mark.parametrize(
    "shape",
    [
        {"ids": 2**20},
        {"positions": 2**20},
        {"keys": 2**20},
        {"keys": 64, "positions": 128, "ids": 128},
    ],
)
def test_every_axis_is_uniform(shape):
    bits = np.array(grid(**shape)).ravel()
    for start in (0, 8, 16, 24):
        counts = np.bincount((bits >> start) & 255, minlength=256)
        assert chi_square_excess(counts, np.full(256, bits.size / 256)) < 0


@pytest.mark.parametrize("shift", BITS.values(), ids=BITS)
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["items", "positions", "ids"])
@pytest.mark.parametrize("apart", [1, 2, 8])
def test_neighbours_have_nothing_to_do_with_each_other(axis, apart, shift):
    bits = (np.array(grid(128, 128, 64)) >> shift) & 15
    one = np.take(bits, range(bits.shape[axis] - apart), axis)
    other = np.take(bits, range(apart, bits.shape[axis]), axis)
    pairs = np.bincount((one * 16 + other).ravel(), minlength=256)
    assert chi_square_excess(pairs, np.full(256, one.size / 256)) < 0


def test_both_words_of_a_key_and_every_bit_of_them_matter():
    keys = [(3, 4)] + [(3 ^ 1 << bit, 4) for bit in range(32)]
    keys += [(3, 4 ^ 1 << bit) for bit in range(32)]
    bits = np.array(random_bits(mx.array(keys, dtype=mx.uint32), mx.array(5), uint32(6)))
    flipped = np.unpackbits((bits[1:] ^ bits[0]).view(np.uint8)).mean()
    assert len(set(bits.tolist())) == 65
    assert abs(flipped - 0.5) < 0.05


def test_the_numbers_of_a_position_differ_by_what_they_are_for():
    noise = chance(50_000)
    zeros = mx.zeros(50_000, mx.int32)
    draft, accept, bonus = (
        np.array(u)
        for u in (
            noise.draft_uniform(0),
            noise.accept_uniforms(1)[:, 0],
            noise.bonus_uniform(zeros),
        )
    )
    for one, other in [(draft, accept), (accept, bonus), (draft, bonus)]:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_a_number_belongs_to_its_answer_position_however_it_is_reached():
    near, far = chance(3, [4, 5, 6]), chance(3, [6, 7, 8])
    assert near.draft_uniform(2).tolist() == far.draft_uniform(0).tolist()
    assert near.accept_uniforms(5)[:, 2:].tolist() == far.accept_uniforms(3).tolist()
    ahead = near.bonus_uniform(mx.array([2, 3, 4])), far.bonus_uniform(mx.array([0, 1, 2]))
    assert ahead[0].tolist() == ahead[1].tolist()


def test_uniforms_never_reach_the_ends():
    ends = uniform(uint32(0, 2**32 - 1))
    assert ends.tolist() == [2**-24, 1 - 2**-24]


def test_gumbel_noise_is_finite_and_fine_where_it_is_large():
    low, high, next_high = gumbel(uint32(2**32 - 1, 0, 2)).tolist()
    assert low == pytest.approx(-np.log(24 * np.log(2)), rel=1e-3)
    assert high == pytest.approx(32 * np.log(2), rel=1e-6)
    assert 0.5 < high - next_high < 2  # neighbours, not the same


def test_gumbel_noise_has_its_distribution():
    noise = np.array(gumbel(grid(ids=2**20))).ravel()
    edges = np.linspace(-2, 8, 41)
    below = np.concatenate([[0], np.exp(-np.exp(-edges)), [1]])
    counts = np.histogram(noise, np.concatenate([[-np.inf], edges, [np.inf]]))[0]
    assert chi_square_excess(counts, np.diff(below) * noise.size) < 0


@pytest.mark.parametrize("vocab", [192, 193, 1021])
def test_noise_does_not_depend_on_the_shape_it_is_made_in(vocab):
    positions, slots = [3, 40, 7], mx.array([True] * 3)
    logits = mx.random.normal((3, 5, vocab), key=mx.random.key(1))
    keys = mx.array([[1, 2], [3, 4], [5, 6]], dtype=mx.uint32)
    together = Chance(keys, mx.array(positions)).perturb(logits, 0, slots)
    for slot in range(3):
        for row in range(5):
            noise = Chance(keys[slot : slot + 1], mx.array(positions[slot : slot + 1]))
            alone = noise.perturb(logits[slot : slot + 1, row : row + 1], row, slots[:1])
            assert mx.array_equal(alone[0, 0], together[slot, row])


def test_slots_without_noise_keep_their_logits_bit_for_bit():
    logits = mx.random.normal((2, 3, 50), key=mx.random.key(1))
    noisy = chance(2).perturb(logits, 0, mx.array([False, True]))
    assert mx.array_equal(noisy[0], logits[0])
    assert not mx.any(noisy[1] == logits[1])
