"""What equal bits cost a product on a CPU: as they come, over safe rows, and without strips.

    [OPENBLAS_CORETYPE=Haswell] python -m benchmarks.products [--sizes 576x1536 320x768]
                                                              [--rows 1 8 16 24 64 128] [--turns 30]

A dense float32 layer of size x width multiplies so many rows in three ways, by turns: as many as
there are; as the program does; and in pieces of safe counts, where it would take strips of columns
(`numerics/strips.py`). Microseconds, medians. One JSON line.
"""

import argparse
import time
from statistics import median

import dspark_batch  # noqa: F401  the BLAS, before MLX

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from benchmarks.common import print_line, surroundings
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.numerics.rows import Product, as_they_come, in_strips, over_safe_rows


def ways_of(size, width):
    """Make a layer, and say how it multiplies in each way."""
    layer = nn.Linear(size, width, bias=False)
    make_rows_safe(layer)
    product = Product("float32", size, width)

    def free(rows):
        with as_they_come():
            return layer(rows)

    def in_pieces(rows):
        return over_safe_rows(product, rows, lambda some: some @ layer.weight.T)

    ways = {"as_they_come": free, "safe": layer, "in_pieces": in_pieces}
    return ways, in_strips(product) is not None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["320x768", "576x1536", "1536x576"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 24, 32, 48, 64, 128])
    parser.add_argument("--turns", type=int, default=30)
    options = parser.parse_args()
    results = []
    for name in options.sizes:
        size, width = map(int, name.split("x"))
        ways, has_strips = ways_of(size, width)
        for count in options.rows:
            rows = mx.random.normal((count, size), key=mx.random.key(count))
            seconds = {way: [] for way in ways}
            for turn in range(-5, options.turns):  # the first ones find verdicts
                for way, multiply in ways.items():
                    began = time.perf_counter()
                    mx.eval(multiply(rows))
                    if turn >= 0:
                        seconds[way].append(time.perf_counter() - began)
            us = {way: round(1e6 * median(each)) for way, each in seconds.items()}
            results.append({"product": name, "strips": has_strips, "rows": count, "us": us})
    print_line({"benchmark": "products", **surroundings(), "results": results})


if __name__ == "__main__":
    main()
