"""Rows of products of many sizes, run together in every number, against the reference.

    python tests/numerics/several_rows.py

Prints what differed, then the BLAS. A process of its own has a BLAS, a kernel and a number of
threads of its own.
"""

import sys
from itertools import product as product_of

from dspark_batch import blas  # isort: skip  before MLX

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.numerics import rows
from dspark_batch.numerics.rows import Product, over_safe_heads, over_safe_rows

COUNTS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 15, 16, 17, 24, 31, 33, 48, 64, 65, 130, 300)
SIZES = ((48, 96), (64, 64), (96, 777), (320, 128), (1000, 17))
QUANTISED = ((4, 64, "affine"), (8, 32, "affine"))


def bits(array):
    return np.array(mx.contiguous(array).view(mx.uint8))


def _layer(product):
    """Make what multiplies: a safe layer of a model, or a plain product."""
    layer = nn.Linear(product.size, product.width, bias=product.has_bias)
    layer.weight = mx.random.normal(layer.weight.shape, key=mx.random.key(7))
    layer.set_dtype(getattr(mx, product.dtype))
    if product.quantised is not None:
        width, group_size, mode = product.quantised
        layer = layer.to_quantized(group_size, width, mode=mode)
    make_rows_safe(layer)
    return layer


def _small_matrices(product, batch=3):
    """Make a product of a matrix for each of some heads."""
    shape = (batch, 1, product.size, product.width)
    weight = mx.random.normal(shape, key=mx.random.key(8)).astype(getattr(mx, product.dtype))
    return lambda given: over_safe_heads(
        product, mx.broadcast_to(given, (batch, *given.shape)), lambda some: some @ weight
    )


def _multiplies(product):
    if product.is_attention:
        return _small_matrices(product)
    if product.is_transposed:
        return _layer(product)
    weight = mx.random.normal((product.size, product.width), key=mx.random.key(9))
    weight = weight.astype(getattr(mx, product.dtype))
    return lambda given: over_safe_rows(product, given, lambda some: some @ weight)


def differences(product, counts):
    """Run rows alone and with others; list the counts whose rows have other bits than alone."""
    multiply, most = _multiplies(product), max(counts)
    many = mx.random.normal((most, product.size), key=mx.random.key(3))
    many = many.astype(getattr(mx, product.dtype))
    looked_at = sorted({0, 1, most // 3, most - 1})
    alone = {row: bits(multiply(many[row : row + 1])[..., 0, :]) for row in looked_at}
    found = []
    for count, last in product_of(counts, (False, True)):
        start = most - count if last else 0
        together = bits(multiply(many[start : start + count]))
        inside = [row for row in looked_at if start <= row < start + count]
        found += [
            f"{product}: row {row} of {count} from {start}"
            for row in inside
            if not np.array_equal(together[..., row - start, :], alone[row])
        ]
    return found


def products():
    for size in SIZES:
        yield Product("float32", *size)
    yield Product("float32", 96, 48, has_bias=True)
    yield Product("bfloat16", 96, 48)
    for quantised in QUANTISED:
        yield Product("float32", 128, 48, quantised=quantised)
    for dtype in ("float32", "bfloat16"):
        yield Product(dtype, 64, 64, is_attention=True)
        yield Product(dtype, 64, 16, is_transposed=False, is_attention=True)


def main():
    for product in products():
        rows.forget()
        for difference in differences(product, COUNTS):
            sys.stdout.write(f"{difference}\n")
    sys.stdout.write(f"{blas.identity()}\n")


if __name__ == "__main__":
    main()
