"""Products over safe rows: a row has the bits of the reference, however many rows there are."""

import io
import os
import re
import subprocess
import sys
from itertools import product as product_of
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from several_rows import differences

from dspark_batch import blas, device
from dspark_batch.numerics import rows
from dspark_batch.numerics.attention import BLOCK, ragged_attention
from dspark_batch.numerics.rows import (
    Product,
    as_they_come,
    in_halves,
    is_safe,
    over_safe_heads,
    over_safe_rows,
    pieces,
    while_they_come,
)

PLAIN = Product("float32", 96, 48)
SMALL = (1, 2, 3, 5, 8, 13, 16, 17, 31, 64, 65, 100)


@pytest.fixture(autouse=True)
def _unknown():
    """Nothing is known before a test, nor is what it planted known after it."""
    verdicts, references = rows.VERDICTS.copy(), rows._references.copy()
    rows.forget()
    yield
    rows.forget()
    rows.VERDICTS.update(verdicts)
    rows._references.update(references)


def plant(monkeypatch, bits_of):
    """Make products whose rows have the bits that a function says.

    Args:
        monkeypatch: pytest's.
        bits_of: tells the bits of a row by (count, place).
    """

    def bits(product, count):
        found = {bits_of(count, place) for place in range(count)}
        return [str(*found).encode()] if len(found) == 1 else None

    monkeypatch.setattr(rows, "_bits", bits)
    monkeypatch.setattr(rows, "_ladder", lambda product: rows._CPU)


def plant_orders(monkeypatch, whole, halved):
    """Plant orders of sums by the count of rows, of a whole product and of one in halves."""
    plant(monkeypatch, lambda count, place: 0)
    monkeypatch.setattr(device, "is_cuda", lambda: True)
    monkeypatch.setattr(
        rows, "_bits", lambda p, count: [b"%d" % (whole, halved)[p.matrices - 1](count)]
    )


def test_sums_that_need_many_rows_are_added_in_halves(monkeypatch):
    halves = PLAIN._replace(size=48, matrices=2)
    plant_orders(monkeypatch, lambda count: count > 48, lambda count: 0)
    assert in_halves(PLAIN) is None  # 64 rows have the reference's order
    rows.forget()
    plant_orders(monkeypatch, lambda count: count == 64, lambda count: 0)
    monkeypatch.setattr(rows, "_PLAIN_ROUND", 8)
    assert in_halves(PLAIN) == halves
    assert pieces(halves, 8) == (8,)
    assert in_halves(PLAIN._replace(size=95)) is None
    with as_they_come():
        assert in_halves(PLAIN) is None
    rows.forget()
    plant_orders(monkeypatch, lambda count: count == 64, lambda count: count == 64)
    assert in_halves(PLAIN) is None  # they do not help
    rows.forget()
    plant_orders(monkeypatch, lambda count: count == 64, lambda count: 0)
    monkeypatch.setattr(device, "is_cuda", lambda: False)
    assert in_halves(PLAIN) is None


def test_what_is_made_while_rows_run_as_they_come_is_made_once_and_let_go():
    made = []

    def make():
        made.append(mx.zeros(3))
        return made[-1]

    with as_they_come():
        first = while_they_come("owner", make)
        with as_they_come():
            assert while_they_come("owner", make) is first
    while_they_come("owner", make)
    while_they_come("owner", make)
    with as_they_come():
        assert while_they_come("owner", make) is not first
    assert len(made) == 4


# How many rows run together


def test_where_all_counts_are_alike_the_least_that_holds_all_rows_runs(monkeypatch):
    plant(monkeypatch, lambda count, place: 0)
    assert [pieces(PLAIN, n) for n in (1, 3, 5, 17, 64)] == [(2,), (4,), (8,), (32,), (64,)]
    assert pieces(PLAIN, 0) == ()


def test_what_a_ladder_does_not_hold_runs_in_its_largest_counts(monkeypatch):
    plant(monkeypatch, lambda count, place: 0)
    assert pieces(PLAIN, 600) == (256, 256, 96)


def test_few_rows_of_another_kernel_are_padded(monkeypatch):
    plant(monkeypatch, lambda count, place: count >= 16)
    assert [pieces(PLAIN, n) for n in (1, 15, 16, 17)] == [(16,), (16,), (16,), (32,)]


def test_a_count_between_two_safe_ones_is_left_out(monkeypatch):
    plant(monkeypatch, lambda count, place: count not in (32, 48))
    assert pieces(PLAIN, 17) == (64,)
    assert pieces(PLAIN, 200) == (208,)


def test_where_larger_counts_are_not_safe_a_product_is_cut(monkeypatch):
    plant(monkeypatch, lambda count, place: count > 64)
    assert [pieces(PLAIN, n) for n in (64, 65, 130, 256)] == [
        (64,),
        (64, 2),
        (64, 64, 2),
        (64, 64, 64, 64),
    ]


def test_where_rows_depend_on_their_place_the_reference_is_smaller(monkeypatch):
    plant(monkeypatch, lambda count, place: 0 if count <= 8 else place % 3)
    assert rows._reference(PLAIN)[0] == 8
    assert pieces(PLAIN, 20) == (8, 8, 4)


def test_where_only_single_rows_are_alike_each_runs_alone(monkeypatch):
    plant(monkeypatch, lambda count, place: place)
    assert rows._reference(PLAIN)[0] == 1
    assert pieces(PLAIN, 3) == (1, 1, 1)


def test_no_padding_is_much_larger_than_what_it_pads(monkeypatch):
    plant(monkeypatch, lambda count, place: count in (64, 256))  # all others have other bits
    assert pieces(PLAIN, 70) == (64, 64)
    plant(monkeypatch, lambda count, place: count in (64, 128, 256))
    rows.forget()
    assert pieces(PLAIN, 70) == (128,)


def test_a_verdict_is_found_once(monkeypatch):
    asked = []
    plant(monkeypatch, lambda count, place: asked.append(count))
    pieces(PLAIN, 40)
    asked.clear()
    assert pieces(PLAIN, 40) == (48,)
    assert asked == []
    assert rows.VERDICTS[PLAIN, 48] is True


def test_a_verdict_that_is_known_is_believed():
    rows.VERDICTS.update({(PLAIN, count): count == 64 for count in rows._CPU.counts})
    rows.VERDICTS.update({(PLAIN, count): count == 512 for count in rows._GPU.counts})
    rows.VERDICTS[PLAIN, 64] = True
    assert pieces(PLAIN, 3) == (64,)


# What runs


def counted(multiply):
    """Note how many rows each product has."""
    counts = []

    def noting(some):
        counts.append(some.shape[-2])
        return multiply(some)

    return noting, counts


def test_rows_are_padded_with_zeros_and_cut_again(monkeypatch):
    plant(monkeypatch, lambda count, place: count in (16, 32, 64))
    some = mx.random.normal((50, 96), key=mx.random.key(0))
    multiply, counts = counted(lambda given: given * 2)
    assert mx.array_equal(over_safe_rows(PLAIN, some, multiply), some * 2)
    assert counts == [64]
    multiply, counts = counted(lambda given: given.sum(axis=1, keepdims=True))
    found = over_safe_rows(PLAIN, mx.concatenate([some] * 3), multiply)
    assert found.shape == (150, 1)
    assert counts == [64, 64, 32]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Let products be made as on a GPU; the operations run here."""
    plant(monkeypatch, lambda count, place: count in (16, 32, 64))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


@pytest.mark.parametrize("batch", [(1, 1), (3, 1), (16,), (7, 5), (50,), (2, 3, 5), (150,)])
def test_a_gpu_fills_up_with_copies(on_a_gpu, batch):
    some = mx.random.normal((*batch, 96), key=mx.random.key(0))
    multiply, counts = counted(lambda given: given * 2)
    assert mx.array_equal(over_safe_rows(PLAIN, some, multiply), some * 2)
    assert set(counts) <= {16, 32, 64}


def test_an_activation_writes_the_copies_itself(on_a_gpu):
    def layer(gate, up):
        return over_safe_rows(PLAIN, mx.sigmoid(gate) * up, lambda rows: rows @ weight)

    weight = mx.zeros((96, 48))
    text = io.StringIO()
    some = mx.zeros((3, 1, 96))
    mx.export_to_dot(text, mx.compile(layer)(some, some))
    operations = re.findall(r'label ?="([A-Za-z]+)"', text.getvalue())
    views, inputs = {"Reshape", "Slice"}, {"Full", "Broadcast"}
    fused, product = (name for name in operations if name not in views | inputs)
    assert fused.startswith("CompiledSigmoid")
    assert "Broadcast" in fused
    assert product == "Matmul"


def test_many_small_matrices_run_as_one_batch_and_a_small_rest_behind_it(monkeypatch):
    plant(monkeypatch, lambda count, place: count in (16, 4))
    monkeypatch.setattr(rows, "_ladder", lambda product: rows._CPU_ATTENTION)
    product = PLAIN._replace(is_attention=True)
    for total in (1, 4, 5, 16, 17, 40):
        some = mx.random.normal((2, 3, total, 96), key=mx.random.key(total))
        shapes = []

        def multiply(given, shapes=shapes):
            shapes.append(given.shape)
            return given * 2

        assert mx.array_equal(over_safe_heads(product, some, multiply), some * 2)
        last = [(2, 3, 1, 4, 96)] if device.is_cpu() and total == 17 else []
        parts = total // 16 if last else -(-total // 16)
        assert shapes == [(2, 3, parts, 4 if total <= 4 else 16, 96), *last]


@pytest.mark.skipif(not device.is_cpu(), reason="a GPU has kernels for results with gaps")
def test_results_of_heads_have_no_gaps_where_rows_were_filled_up():
    """What follows on a CPU takes twice as long over gaps."""
    product = Product("float32", 8, 8, is_attention=True)
    found = over_safe_heads(product, mx.ones((2, 3, 33, 8)), lambda rows: rows * 2)
    assert memoryview(found).c_contiguous


class Batches:
    """Products on a device that adds in another order in batches of some numbers."""

    def __init__(self, monkeypatch, is_other):
        self.numbers = set()  # of matrices that were multiplied together
        self._is_other, self._plain = is_other, rows._matmul
        monkeypatch.setattr(rows, "_matmul", self.multiply)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))

    def multiply(self, product, some, weights):
        number = max(some.shape[0], weights.shape[0]) if some.ndim == 3 else 1
        self.numbers.add(number)
        if not self._is_other(number):
            return self._plain(product, some, weights)
        halves = [slice(0, product.size // 2), slice(product.size // 2, None)]
        parts = [
            some[..., half] @ (weights[..., half].swapaxes(-1, -2))
            if product.is_transposed
            else some[..., half] @ weights[..., half, :]
            for half in halves
        ]
        return parts[0] + parts[1]


OTHERS = {
    "few": lambda number: number < 16,
    "many": lambda number: number > 128,
    "but_one": lambda number: number != 128,
    "odd_ones": lambda number: number in (2, 8, 64, 512),
    "none": lambda number: False,
}


def steps_with_other_bits():
    """Attend with a slot alone and beside others; list slots and blocks where its bits change."""
    lengths = mx.array([5] * 33)
    shapes = [(33, 4, 3, 64), (33, 2, 2 * BLOCK, 64), (33, 2, 2 * BLOCK, 32)]
    queries, keys, values = (
        mx.random.normal(shape, key=mx.random.key(seed)) for seed, shape in enumerate(shapes)
    )
    found = {}
    for slots, blocks in product_of((1, 2, 8, 33), (1, 2)):
        visible = mx.broadcast_to(mx.arange(blocks * BLOCK) < 5, (slots, 1, 1, blocks * BLOCK))
        cached = (each[:slots, :, : blocks * BLOCK] for each in (keys, values))
        attended = ragged_attention(queries[:slots], *cached, 0.1, visible, lengths[:slots])
        found[slots, blocks] = attended[0]
    return [step for step, bits in found.items() if not mx.array_equal(bits, found[1, 1])]


@pytest.mark.parametrize("is_other", OTHERS.values(), ids=OTHERS)
def test_the_number_of_matrices_in_a_batch_changes_no_bit(monkeypatch, is_other):
    batches = Batches(monkeypatch, is_other)
    assert steps_with_other_bits() == []
    assert batches.numbers <= {*rows._GPU_ATTENTION.matrices}


def test_the_check_of_batches_sees_one_that_runs_as_it_comes(monkeypatch):
    Batches(monkeypatch, OTHERS["few"])
    monkeypatch.setattr(rows, "_safe_number", lambda product, count, total: total)
    assert steps_with_other_bits() != []


def test_mlx_lms_own_way_is_one_product_of_all_rows(monkeypatch):
    plant(monkeypatch, lambda count, place: count == 64)
    some = mx.zeros((3, 96))
    multiply, counts = counted(lambda given: given)
    with as_they_come():
        over_safe_rows(PLAIN, some, multiply)
        over_safe_heads(PLAIN, some, multiply)
    over_safe_rows(PLAIN, some, multiply)
    assert counts == [3, 3, 64]


def test_an_error_ends_the_other_way_too():
    def fails():
        with as_they_come():
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not rows.are_as_they_come()


# The bits of this machine


@pytest.mark.parametrize(
    "product",
    [
        PLAIN,
        PLAIN._replace(has_bias=True),
        Product("float32", 1000, 17),
        Product("bfloat16", 96, 48),
        Product("float16", 64, 40, has_bias=True),
        Product("float32", 96, 48, is_transposed=False),
        Product("float32", 128, 32, quantised=(4, 64, "affine")),
        Product("float32", 64, 48, quantised=(8, 32, "affine"), has_bias=True),
    ],
    ids=str,
)
def test_rows_of_any_count_have_the_bits_of_the_reference(product):
    assert differences(product, SMALL) == []


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *(("float32", size) for size in [(64, 64), (320, 128), (1000, 17)]),
        ("bfloat16", (64, 64)),
        pytest.param("float32", (1536, 512), marks=pytest.mark.slow),
        pytest.param("bfloat16", (320, 128), marks=pytest.mark.slow),
        pytest.param("bfloat16", (1000, 17), marks=pytest.mark.slow),
    ],
)
def test_so_they_have_for_every_count(dtype, size):
    assert differences(Product(dtype, *size), range(1, 301)) == []


@pytest.mark.skipif(not device.is_cpu(), reason="a GPU's kernels are tried as they are")
@pytest.mark.parametrize(("size", "width", "count"), [(70, 2, 4), (730, 6, 48)])
def test_rows_that_lie_as_columns_have_the_bits_of_others(size, width, count):
    for seed in range(5):
        some, weight = (
            mx.random.normal((total, size), key=mx.random.key(10 * seed + total))
            for total in (count, width)
        )
        product = Product("float32", size, width)
        found, expected = (
            over_safe_rows(product, rows_of, lambda rows, weight=weight: rows @ weight.T)
            for rows_of in (mx.contiguous(some.T).T, some)
        )
        assert mx.array_equal(found, expected)


def test_the_check_sees_products_that_run_as_they_come(monkeypatch):
    def as_it_comes(product, count):
        return (count,)

    product = Product("float32", 1000, 17)
    counts = [count for count in SMALL if not is_safe(product, count)]
    if not counts:
        pytest.skip("here every product of this size is safe")
    monkeypatch.setattr(rows, "pieces", as_it_comes)
    assert differences(product, SMALL) != []


ENVIRONMENTS = {
    "haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "sandybridge": {"OPENBLAS_CORETYPE": "Sandybridge"},
    "two_threads": {"OPENBLAS_NUM_THREADS": "2"},
    "haswell_with_two_threads": {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "2"},
    "mlx's_own": {"DSPARK_BATCH_BLAS": "bundled"},
}
OFTEN = ("haswell", "haswell_with_two_threads", "mlx's_own")  # a process each


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one BLAS")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in ENVIRONMENTS],
)
def test_so_they_have_with_other_kernels_and_threads(name):
    if blas.LOADED.kind != "openblas" and "DSPARK_BATCH_BLAS" not in ENVIRONMENTS[name]:
        pytest.skip("there is no OpenBLAS here")
    script = Path(__file__).parent / "several_rows.py"
    said = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | ENVIRONMENTS[name],
        capture_output=True,
        text=True,
        check=True,
    )
    *differ, identity = said.stdout.splitlines()
    assert differ == []
    expected = ENVIRONMENTS[name].get("OPENBLAS_CORETYPE", "")
    assert expected in identity


def test_the_bits_of_a_reference_tell_libraries_apart():
    product = Product("float32", 3000, 64)
    known = rows.reference_bits(product)
    assert known == rows.reference_bits(product)
    rows.forget()
    assert known == rows.reference_bits(product)
    assert len(known) > 256
    assert known != rows.reference_bits(product._replace(size=3001))


def test_samples_are_of_the_size_that_is_asked_about():
    for product in (PLAIN, PLAIN._replace(is_transposed=False), PLAIN._replace(has_bias=True)):
        assert rows._sample(product)(mx.ones((5, 96))).shape == (5, 48)
    row_major = memoryview(rows._cancelling((5, 96), mx.float32, 1, sign=-1))
    assert row_major.c_contiguous  # as a layer's weight is; other layouts have other kernels
    found = rows._sample(Product("float32", 64, 600))(mx.ones((1, 64)))  # a repeated weight
    assert found.shape == (1, 600)
    assert np.array_equal(np.array(found[0, :256]), np.array(found[0, 256:512]))
