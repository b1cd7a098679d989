"""Attention over a ragged cache, against float32; on CUDA that is our kernel."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest
from grids import grid

from dspark_batch import blas
from dspark_batch.numerics import attention
from dspark_batch.numerics.attention import (
    BLOCK,
    attention_by_kernel,
    has_beginnings,
    products_attention,
    ragged_attention,
)
from dspark_batch.numerics.masks import ragged_block, ragged_causal, windowed_block

OTHERS = [
    pytest.param({"OPENBLAS_CORETYPE": "Haswell"}, marks=pytest.mark.slow),
    pytest.param({"OPENBLAS_NUM_THREADS": "2"}, marks=pytest.mark.slow),
    {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "2"},
    {"DSPARK_BATCH_BLAS": "bundled"},
]
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


def right_with(queries, keys, values, scale, mask, sinks=None, softcap=None):
    """The definition with all that attention may have; a sink is a position without a value."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (mx.repeat(array, groups, axis=1) for array in (keys, values))
    scores = scale * (queries @ keys.swapaxes(-1, -2))
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    scores = mx.where(mask, scores, -mx.inf)
    if sinks is not None:
        sinks = mx.broadcast_to(sinks[None, :, None, None], (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sinks], axis=-1)
    return mx.softmax(scores, axis=-1)[..., : values.shape[2]] @ values


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
@pytest.mark.parametrize(("width", "dim", "blocks"), [(1, 64, 1), (7, 128, 2), (40, 64, 3)])
def test_it_is_attention(dtype, mask, heads, kv_heads, width, dim, blocks):
    capacity = blocks * BLOCK
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "dim": dim}
    arrays, lengths = drawn(dtype, **sizes, capacity=capacity)
    visible, scale = mask(lengths, width, capacity), dim**-0.5
    found = ragged_attention(*arrays, scale, visible, lengths)
    assert found.shape == arrays[0].shape
    assert mx.abs(found.astype(mx.float32) - right(*arrays, scale, visible)).max() < ERROR[dtype]


@pytest.mark.parametrize("sinks", [None, -3.0, 0.0, 40.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_and_caps_are_part_of_it(sinks, softcap):
    arrays, lengths = drawn(mx.float32, heads=6, kv_heads=2, width=3, dim=16, capacity=2 * BLOCK)
    mask = causal(lengths, 3, 2 * BLOCK)
    more = {"softcap": softcap}
    if sinks is not None:
        more["sinks"] = mx.linspace(sinks - 1, sinks + 1, 6)
    attended = ragged_attention(*arrays, 0.5, mask, lengths, **more)
    error = mx.abs(attended - right_with(*arrays, 0.5, mask, **more)).max()
    assert error.item() < ERROR[mx.float32]


@pytest.mark.parametrize("bad", [mx.nan, mx.inf])
def test_what_is_no_number_stays_in_its_slot_and_is_seen_there(bad):
    arrays, lengths = drawn(mx.bfloat16, heads=4, kv_heads=2, width=3, dim=64, capacity=BLOCK)
    mask = ragged_causal(lengths, 3, BLOCK)
    known = ragged_attention(*arrays, 0.125, mask, lengths)
    arrays[1][3, :, 2] = bad
    found = ragged_attention(*arrays, 0.125, mask, lengths)
    is_number = mx.isfinite(found).all(axis=(1, 2, 3)).tolist()
    assert is_number == [True, True, True, False, True]
    assert mx.array_equal(found[:3], known[:3])


SIZES = [(2, 2, 16), (8, 2, 64), (6, 3, 128), (4, 1, 256)]  # heads, key heads, dim


@pytest.fixture(scope="module", params=[40, 600], ids=["short", "long"])
def positions(request):
    """Positions of the longest slot, before its step."""
    return request.param


def slots_of(dtype, size, positions, *, width=6):
    """Draw three slots of one size: queries, keys, values, lengths."""
    heads, kv_heads, dim = size
    capacity = blocks(positions + width)
    shapes = [(3, heads, width, dim), (3, kv_heads, capacity, dim), (3, kv_heads, capacity, dim)]
    drawn = [
        mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
        for seed, shape in enumerate(shapes)
    ]
    return drawn, mx.array([0, positions // 2, positions])


def blocks(positions):
    return -(-positions // BLOCK) * BLOCK


def attended(arrays, lengths):
    width, capacity = arrays[0].shape[2], arrays[1].shape[2]
    mask = ragged_causal(lengths, width, capacity)
    return ragged_attention(*arrays, 0.125, mask, lengths)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_room_behind_a_slots_end_changes_no_bit(dtype, size, positions):
    arrays, lengths = slots_of(dtype, size, positions)
    known = attended(arrays, lengths)
    for more in (BLOCK, 5 * BLOCK):
        room = [(0, 0), (0, 0), (0, more), (0, 0)]
        longer = [arrays[0], *(mx.pad(a, room, constant_values=3) for a in arrays[1:])]
        assert mx.array_equal(attended(longer, lengths), known)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_neighbours_change_no_bit(dtype, size, positions):
    arrays, lengths = slots_of(dtype, size, positions)
    known = attended(arrays, lengths)
    for chosen in ([2], [1, 1, 2], [0, 2, 1, 2, 0, 1, 2], [2] * 33):
        where = mx.array(chosen)
        found = attended([array[where] for array in arrays], lengths[where])
        assert mx.array_equal(found, known[where])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_width_of_a_step_changes_no_bit(dtype, size, positions):
    arrays, lengths = slots_of(dtype, size, positions, width=40)
    known = attended(arrays, lengths)
    queries, *cached = arrays
    for width in (1, 2, 3, 7, 16, 17, 33):
        assert mx.array_equal(
            attended([queries[:, :, :width], *cached], lengths), known[:, :, :width]
        )
    last = attended([queries[:, :, 39:], *cached], lengths + 39)
    assert mx.array_equal(last, known[:, :, 39:])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_mlxs_own_within_rounding(size, positions):
    arrays, lengths = slots_of(mx.float32, size, positions)
    mask = ragged_causal(lengths, 6, arrays[1].shape[2])
    own = mx.fast.scaled_dot_product_attention(*arrays, scale=0.125, mask=mask)
    assert mx.abs(attended(arrays, lengths) - own).max() < ERROR[mx.float32]


def test_products_attention_is_what_runs_without_a_kernel(monkeypatch):
    arrays, lengths = slots_of(mx.float32, (8, 2, 64), 100)
    mask = ragged_causal(lengths, 6, arrays[1].shape[2])
    known = attended(arrays, lengths)
    assert mx.array_equal(products_attention(*arrays, 0.125, mask), known)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_that_run_some_at_a_time_change_no_bit(dtype, size, monkeypatch):
    arrays, lengths = slots_of(dtype, size, 100, width=7)
    capacity = arrays[1].shape[2]
    causal, seen_by_all = (f(lengths, 7, capacity) for f in (ragged_causal, ragged_block))
    for mask, is_causal in ((causal, True), (causal, False), (seen_by_all, False)):
        known = products_attention(*arrays, 0.125, mask)
        for tokens in (0, 1, 3, 6):
            most = tokens * 3 * size[0] * capacity
            monkeypatch.setattr(attention, "_MOST_SCORES", most)
            found = products_attention(*arrays, 0.125, mask, is_causal=is_causal)
            assert mx.array_equal(found, known)
        monkeypatch.undo()


def test_scores_take_no_more_memory_than_they_may(monkeypatch):
    """Peak memory beside what is given: a few copies of the scores that may be there at a time."""
    queries, keys, values = (
        mx.random.normal((1, heads, places, 16), key=mx.random.key(heads))
        for heads, places in ((8, 64), (2, 64 * BLOCK), (2, 64 * BLOCK))
    )
    mask = ragged_causal(mx.array([63 * BLOCK]), 64, 64 * BLOCK)
    mx.eval(queries, keys, values, mask)

    def peak(most):
        monkeypatch.setattr(attention, "_MOST_SCORES", most)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(products_attention(queries, keys, values, 0.25, mask))
        return mx.get_peak_memory() - before

    whole = 8 * 64 * 64 * BLOCK  # numbers
    assert peak(whole) > 4 * whole
    assert peak(whole // 64) < 4 * whole / 4


MASKS = {"causal": causal, "windowed": windowed, "block": block, "own past": own_past}
MORE = {"plain": {}, "sinks": {"sinks": True}, "softcap": {"softcap": 2.0}}


def begun(dtype, size, slots, width, *, blocks=(3, 2)):
    """Draw slots with a beginning: queries, the beginning, what is behind it, and both whole."""
    (heads, kv_heads, dim), (shared, own) = size, (each * BLOCK for each in blocks)
    shapes = [(slots, heads, width, dim), *[(kv_heads, shared, dim)] * 2]
    shapes += [(slots, kv_heads, own, dim)] * 2
    drawn = [
        mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
        for seed, shape in enumerate(shapes)
    ]
    queries, beginning, behind = drawn[0], (drawn[1], drawn[2]), drawn[3:]
    whole = [
        mx.concatenate([mx.broadcast_to(one[None], (slots, *one.shape)), each], axis=2)
        for one, each in zip(beginning, behind, strict=True)
    ]
    lengths = shared + (mx.arange(slots) * 37) % (own - width + 1)
    return queries, beginning, behind, whole, lengths


@pytest.mark.skipif(not has_beginnings(), reason="nobody has tried it on Metal")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("mask", "more", "slots", "width"), grid([*MASKS], [*MORE], [1, 2, 3, 7, 16], [1, 8, 5, 2, 70])
)
def test_a_beginning_that_is_read_once_changes_no_bit(dtype, size, mask, more, slots, width):
    queries, beginning, behind, whole, lengths = begun(dtype, size, slots, width)
    visible, more = MASKS[mask](lengths, width, whole[0].shape[2]), dict(MORE[more])
    if "sinks" in more:
        more["sinks"] = mx.linspace(-1, 3, size[0])
    known = ragged_attention(queries, *whole, 0.125, visible, lengths, **more)
    where = queries, *behind, 0.125, visible, lengths
    is_causal = mask in ("causal", "windowed")
    found = ragged_attention(*where, **more, is_causal=is_causal, beginning=beginning)
    assert mx.array_equal(found, known)
    # And it matters.
    other = ragged_attention(*where, **more, beginning=beginning[::-1])
    assert mask == "windowed" or not mx.array_equal(other, known)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_a_causal_step_leaves_out_changes_no_bit(dtype, size):
    width, more = BLOCK + 41, {"softcap": 5.0} if size[0] == 2 else {}
    for before, window in ((0, None), (BLOCK - 41, 20), (3 * BLOCK + 5, None)):
        arrays, lengths = slots_of(dtype, size, before, width=width)
        mask = ragged_causal(lengths, width, arrays[1].shape[2], window)
        known = ragged_attention(*arrays, 0.5, mask, lengths, **more)
        found = ragged_attention(*arrays, 0.5, mask, lengths, is_causal=True, **more)
        assert mx.array_equal(found, known)


@pytest.mark.skipif(ON_CUDA, reason="the kernel is another way")
def test_what_is_behind_the_tokens_of_a_causal_step_is_not_computed(monkeypatch):
    scores = []
    plain = attention._products

    def counted(queries, keys, *rest):
        scores.append((queries.shape[2], keys.shape[2]))
        return plain(queries, keys, *rest)

    monkeypatch.setattr(attention, "_products", counted)
    arrays, lengths = slots_of(mx.float32, (2, 2, 16), BLOCK + 3, width=2 * BLOCK + 5)
    mask = ragged_causal(lengths, 2 * BLOCK + 5, arrays[1].shape[2])
    ragged_attention(*arrays, 0.125, mask, lengths, is_causal=True)
    assert scores == [(5, 2 * BLOCK), (BLOCK, 3 * BLOCK), (BLOCK, 4 * BLOCK)]


@pytest.mark.skipif(not ON_CUDA, reason="the kernel is CUDA's")
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_the_number_of_splits_changes_no_bit(size):
    arrays, lengths = slots_of(mx.bfloat16, size, 3000)
    mask = ragged_causal(lengths, 6, arrays[1].shape[2])
    known = attention_by_kernel(*arrays, 0.125, mask, lengths, splits=1)
    assert mx.abs(known - products_attention(*arrays, 0.125, mask)).max() < ERROR[mx.bfloat16]
    for splits in (2, 3, 5, 12, 40, None):
        found = attention_by_kernel(*arrays, 0.125, mask, lengths, splits=splits)
        assert mx.array_equal(found, known)


@pytest.mark.skipif(not ON_CUDA, reason="the kernel is CUDA's")
@pytest.mark.parametrize("few_blocks", [128, 0])  # whether its pieces are split over several
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_neither_does_a_beginning(size, few_blocks, monkeypatch):
    monkeypatch.setattr(attention, "_FEW_BLOCKS", few_blocks)
    arrays, lengths = slots_of(mx.bfloat16, size, 3000)
    queries, keys, values = arrays
    same = [mx.broadcast_to(each[:1], each.shape) for each in (keys, values)]
    for start in (256, 1024, 2816):
        whole = [
            mx.concatenate([one[:, :, :start], each[:, :, start:]], axis=2)
            for one, each in zip(same, (keys, values), strict=True)
        ]
        beginning = tuple(mx.contiguous(each[0, :, :start]) for each in whole)
        behind = [mx.contiguous(each[:, :, start:]) for each in whole]
        for width in (6, 1):
            mask = ragged_causal(lengths, width, keys.shape[2])
            seen = mx.maximum(lengths, start)  # a slot that is empty stands behind the beginning
            where = (0.125, mask, seen)
            for splits in (1, 3, None):
                some = queries[:, :, :width]
                known = attention_by_kernel(some, *whole, *where, splits=splits)
                found = attention_by_kernel(
                    some, *behind, *where, splits=splits, beginning=beginning
                )
                assert mx.array_equal(found, known)


def test_a_whole_hidden_block_leaves_only_what_is_visible():
    arrays, lengths = slots_of(mx.float32, (2, 2, 16), 3 * BLOCK)
    mask = windowed(lengths, 6, arrays[1].shape[2])  # the first blocks of the last slot are hidden
    found = ragged_attention(*arrays, 0.125, mask, lengths)
    assert mx.abs(found - right(*arrays, 0.125, mask)).max() < ERROR[mx.float32]


@pytest.mark.skipif(ON_CUDA, reason="a CPU's sum is what both are compared with")
@pytest.mark.parametrize("blocks", [1, 2, 3, 33])
@pytest.mark.parametrize("inner", [(1, 1, 16), (5, 40), (2, 3)])
def test_blocks_are_added_in_order_on_every_device(monkeypatch, blocks, inner):
    numbers = mx.random.normal((3, 2, blocks, *inner), key=mx.random.key(blocks))
    expected = attention._added(numbers)
    monkeypatch.setattr(attention.device, "is_cpu", lambda: False)
    assert mx.array_equal(attention._added(numbers), expected)


@pytest.mark.skipif(ON_CUDA or sys.platform != "linux", reason="elsewhere there is one BLAS")
@pytest.mark.parametrize("variables", OTHERS, ids=lambda variables: "-".join(variables.values()))
def test_bits_stay_with_other_kernels_and_threads(variables):
    if blas.LOADED.kind != "openblas" and "DSPARK_BATCH_BLAS" not in variables:
        pytest.skip("there is no OpenBLAS here")
    some = "no_bit and dtype0 and (16 or 128)"  # two of the sizes
    command = [sys.executable, "-m", "pytest", "-q", "-k", some, __file__]
    said = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stdout
