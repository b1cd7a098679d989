"""A product in strips is the product, and gives rows one order of additions in every place."""

import mlx.core as mx
import numpy as np
import pytest
from test_safe_rows import PLAIN, _unknown, plant  # noqa: F401  a fixture, used by all

from dspark_batch.numerics import rows
from dspark_batch.numerics.rows import in_strips, is_safe, pieces
from dspark_batch.numerics.strips import _EDGE, _MOST, Strips, _cut

IN_STRIPS = PLAIN._replace(in_strips=True)
WIDTHS = (1, 7, 8, 40, 304, 305, 320, 777, 1536, 1563)


def whole(count, width, size=24):
    """Make rows and a weight of small whole numbers, whose product has no rounding."""
    generator = np.random.default_rng(width)
    shapes = (count, size), (width, size)
    return (mx.array(generator.integers(-9, 9, shape).astype(np.float32)) for shape in shapes)


@pytest.mark.parametrize("width", WIDTHS)
def test_strips_give_the_product(width):
    some, weight = whole(13, width)
    found = Strips(weight).multiply(some)
    assert mx.array_equal(found, some @ weight.T)
    assert memoryview(found).c_contiguous  # what follows on a CPU takes twice as long over gaps


@pytest.mark.parametrize("width", [40, 320, 777])
def test_a_weight_and_its_strips_are_one_memory(width):
    _, weight = whole(1, width)
    strips = Strips(weight)
    assert mx.array_equal(strips.weight, weight)
    weight_at, strips_at = (
        np.asarray(memoryview(each)).ctypes.data for each in (strips.weight, strips._strips)
    )
    assert weight_at - strips_at == _EDGE * 24 * weight.itemsize


@pytest.mark.parametrize("width", WIDTHS)
def test_no_column_that_counts_is_at_an_edge(width):
    """Columns at edges hold what is no number; none of it comes out."""
    some, weight = whole(3, width)
    strips = Strips(weight)
    edges = mx.ones(strips._strips.shape[1]).at[_EDGE:-_EDGE].multiply(0)
    broken = strips._strips + mx.where(edges > 0, float("nan"), 0)[None, :, None]
    strips._strips = broken
    assert mx.array_equal(strips.multiply(some), some @ weight.T)


def test_strips_are_few_and_none_is_too_wide():
    for width in range(1, 2000):
        count, step = _cut(width)
        fewest = -(-width // (_MOST - 2 * _EDGE))
        assert fewest <= count <= 1.5 * fewest
        assert count * step >= width
        assert step % 8 == 0
        assert step + 2 * _EDGE <= _MOST
    assert _cut(1536) == (6, 256)  # six of 256 give no column too much
    assert _cut(777) == (3, 264)


# Which products run in strips


def _by_place(count, place):
    return 0 if count <= 8 else place % 12 < 6


def _of_tiles(count, place):
    return 0 if count % 12 <= 3 else place


def plant_tiles(monkeypatch, *, rows_of_strips, rows_of_pieces=_by_place):
    """Plant the bits of rows in strips, and of rows in products without them."""

    def bits(product, count):
        kind = rows_of_strips if product.in_strips else rows_of_pieces
        found = {kind(count, place) for place in range(count)}
        return [str(*found).encode()] if len(found) == 1 else None

    plant(monkeypatch, _by_place)
    monkeypatch.setattr(rows, "_bits", bits)
    ladders = {True: rows._CPU_STRIPS, False: rows._CPU}
    monkeypatch.setattr(rows, "_ladder", lambda product: ladders[product.in_strips])


def test_where_rows_depend_on_their_place_a_product_runs_in_strips(monkeypatch):
    plant_tiles(monkeypatch, rows_of_strips=_of_tiles)
    assert in_strips(PLAIN) == IN_STRIPS
    assert [pieces(IN_STRIPS, count) for count in (1, 3, 4, 16, 25, 64, 128)] == [
        *((2,), (3,), (12,), (24,), (27,), (72,), (132,)),
    ]
    assert pieces(IN_STRIPS, 300) == (267, 36)


def test_where_strips_do_not_help_it_runs_in_pieces(monkeypatch):
    plant_tiles(monkeypatch, rows_of_strips=_by_place)
    assert in_strips(PLAIN) is None
    plant_tiles(monkeypatch, rows_of_strips=lambda count, place: place)
    rows.forget()
    assert in_strips(PLAIN) is None


@pytest.mark.parametrize("alike", [64, 16])
def test_where_rows_of_large_products_are_alike_there_are_no_strips(monkeypatch, alike):
    plant_tiles(
        monkeypatch,
        rows_of_strips=lambda count, place: 0,
        rows_of_pieces=lambda count, place: place if count > alike else 0,
    )
    assert in_strips(PLAIN) is None


def test_a_sample_of_strips_is_multiplied_in_strips(monkeypatch):
    made = []
    monkeypatch.setattr(rows, "Strips", lambda weight: made.append(weight.shape) or Strips(weight))
    assert rows._sample(IN_STRIPS)(mx.ones((5, 96))).shape == (5, 48)
    assert made == [(48, 96)]


def test_only_dense_weights_and_only_a_cpu_have_strips(monkeypatch):
    plant_tiles(monkeypatch, rows_of_strips=_of_tiles)
    assert in_strips(PLAIN._replace(quantised=(4, 32, "affine"))) is None
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    rows.forget()
    assert in_strips(PLAIN) is None


def test_what_a_product_runs_in_is_asked_once(monkeypatch):
    plant_tiles(monkeypatch, rows_of_strips=_of_tiles)
    in_strips(PLAIN)
    monkeypatch.setattr(rows, "is_safe", lambda product, count: pytest.fail("asked again"))
    assert in_strips(PLAIN) == IN_STRIPS
    rows.forget()
    monkeypatch.setattr(rows, "is_safe", is_safe)
    plant_tiles(monkeypatch, rows_of_strips=_by_place)
    assert in_strips(PLAIN) is None
