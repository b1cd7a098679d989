"""Attention of a step over a ragged cache: MLX's masked one, products, and ours, in microseconds.

    python -m benchmarks.attention [--layers 36] [--over-shared] [--toy]

For each shape the time of one layer, in a chain of `layers` that is compiled as a pass is, medians
of 5; and the largest error against float32. `same` says whether our bits stay when the buffers are
longer, other slots are gone, or the step is narrower. Then the same where all slots begin alike:
the beginning in copies and kept once; `same` says whether both have the same bits. With
--over-shared only that. Heads as in Qwen3-4B: 32 over 8, of 128. One JSON line.
"""

import argparse
import sys
import time
from statistics import median

import mlx.core as mx

from benchmarks.common import print_line, surroundings
from dspark_batch.numerics.attention import BLOCK, products_attention, ragged_attention
from dspark_batch.numerics.masks import ragged_causal

# Slots, tokens of the step, positions of the buffers, positions that are cached on average.
SHAPES = [
    (64, 8, 512, 300),
    (64, 8, 1024, 700),
    (64, 1, 512, 300),
    (32, 8, 512, 300),
    (32, 8, 1024, 700),
    (8, 8, 512, 300),
    (8, 8, 2048, 1500),
    (8, 128, 256, 64),
]
TOY_SHAPES = [(2, 4, BLOCK, 30)]
# Slots, tokens of the step, positions of a beginning that all slots share, positions behind it.
SHARED = [(64, 1, 1280, 200), (64, 8, 1280, 200), (32, 1, 1280, 200), (32, 8, 1280, 200)]
SHARED += [(16, 1, 1280, 200), (16, 8, 1280, 200), (64, 8, 256, 200)]
TOY_SHARED = [(3, 2, 2 * BLOCK, 20)]
HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5


def masked(queries, keys, values, mask, lengths):
    """Attend by MLX's own kernel."""
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask=mask)


def products(queries, keys, values, mask, lengths):
    """Attend by MLX's products over blocks of positions."""
    return products_attention(queries, keys, values, SCALE, mask)


def ragged(queries, keys, values, mask, lengths):
    """Attend as rounds do."""
    return ragged_attention(queries, keys, values, SCALE, mask, lengths)


WAYS = {"masked": masked, "products": products, "ragged": ragged}


def drawn(shape, dtype):
    """Draw queries, keys, values; spread the lengths."""
    slots, width, capacity, context = shape
    keys = mx.random.split(mx.random.key(slots + capacity), 3)
    shapes = [(HEADS, width), (KV_HEADS, capacity), (KV_HEADS, capacity)]
    arrays = [
        mx.random.normal((slots, heads, places, DIM), key=key).astype(dtype)
        for (heads, places), key in zip(shapes, keys, strict=True)
    ]
    spread = min(context, 32)
    lengths = (context - spread + mx.arange(slots) * 2 * spread // slots).astype(mx.int32)
    return arrays, mx.minimum(lengths, capacity - width)


def seconds_a_layer(way, shape, dtype, layers):
    """Time a chain of layers, each of which takes its queries from the one before."""
    (queries, keys, values), lengths = drawn(shape, dtype)
    buffers = [(keys + n, values + n) for n in range(min(layers, 8))]  # more than caches hold

    @mx.compile
    def chain(queries, lengths, buffers):
        mask = ragged_causal(lengths, shape[1], shape[2])
        for layer in range(layers):
            queries = 0.5 * way(queries, *buffers[layer % len(buffers)], mask, lengths)
        return queries

    mx.eval(chain(queries, lengths, buffers))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        mx.eval(chain(queries, lengths, buffers))
        times.append(time.perf_counter() - began)
    return median(times) / layers


def largest_error(way, shape, dtype):
    """Compare with the same numbers in float32."""
    arrays, lengths = drawn(shape, dtype)
    mask = ragged_causal(lengths, shape[1], shape[2])
    right = masked(*(array.astype(mx.float32) for array in arrays), mask, lengths)
    return mx.abs(way(*arrays, mask, lengths).astype(mx.float32) - right).max().item()


def keeps_bits(shape, dtype):
    """Say what our bits do not depend on."""
    slots, _, capacity, _ = shape
    (queries, keys, values), lengths = drawn(shape, dtype)

    def attended(queries, keys, values, lengths):
        mask = ragged_causal(lengths, queries.shape[2], keys.shape[2])
        return ragged(queries, keys, values, mask, lengths)

    known = attended(queries, keys, values, lengths)
    longer = [mx.pad(array, [(0, 0), (0, 0), (0, capacity), (0, 0)]) for array in (keys, values)]
    alone = slice(slots // 2, slots // 2 + 1)
    left = (queries[alone], keys[alone], values[alone], lengths[alone])
    one = attended(queries[:, :, :1], keys, values, lengths)
    return {
        "in longer buffers": mx.array_equal(attended(queries, *longer, lengths), known).item(),
        "without other slots": mx.array_equal(attended(*left), known[alone]).item(),
        "in a narrower step": mx.array_equal(one, known[:, :, :1]).item(),
    }


def shared(shape, dtype, layers):
    """Time attention over a beginning in copies, and kept once."""
    slots, width, start, own = shape
    capacity = -(-(start + own + width) // BLOCK) * BLOCK
    (queries, *whole), lengths = drawn((slots, width, capacity, start + own), dtype)
    first = [mx.contiguous(each[0, :, :start]) for each in whole]
    behind = [mx.contiguous(each[:, :, start:]) for each in whole]
    alike = [mx.broadcast_to(each[None], (slots, *each.shape)) for each in first]
    whole = [mx.concatenate(each, axis=2) for each in zip(alike, behind, strict=True)]
    mask = ragged_causal(lengths, width, capacity)

    def attended(queries, own, beginning=None):
        return ragged_attention(queries, *own, SCALE, mask, lengths, beginning=beginning)

    def in_copies(queries, own, first):
        return attended(queries, own)

    result, found = dict(zip(("slots", "width", "shared", "own"), shape, strict=True)), []
    for name, way, own in (("copies", in_copies, whole), ("once", attended, behind)):
        # As many arrays as layers have, up to 8: one would stay in the GPU's cache.
        sets = [[[a + n for a in each] for each in (own, first)] for n in range(min(layers, 8))]
        mx.eval(sets)

        @mx.compile
        def chain(queries, sets, way=way):
            for layer in range(layers):
                queries = 0.5 * way(queries, *sets[layer % len(sets)])
            return queries

        found.append(way(queries, own, first))
        mx.eval(chain(queries, sets), found)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            mx.eval(chain(queries, sets))
            times.append(time.perf_counter() - began)
        result[f"{name}_us"] = round(1e6 * median(times) / layers, 1)
    return {**result, "same": mx.array_equal(*found).item()}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--toy", action="store_true", help="one small shape, to try this on a CPU")
    parser.add_argument("--over-shared", action="store_true")
    options = parser.parse_args()
    dtype = mx.float32 if options.toy else mx.bfloat16
    readings = []
    shapes = [] if options.over_shared else TOY_SHAPES if options.toy else SHAPES
    for shape in shapes:
        reading = dict(zip(("slots", "width", "capacity", "context"), shape, strict=True))
        for name, way in WAYS.items():
            reading[f"{name}_us"] = round(
                1e6 * seconds_a_layer(way, shape, dtype, options.layers), 1
            )
            reading[f"{name}_error"] = round(largest_error(way, shape, dtype), 5)
        reading["same"] = keeps_bits(shape, dtype)
        readings.append(reading)
        print(reading, file=sys.stderr, flush=True)
    over_shared = []
    for shape in TOY_SHARED if options.toy else SHARED:
        over_shared.append(shared(shape, dtype, options.layers))
        print(over_shared[-1], file=sys.stderr, flush=True)
    result = {"readings": readings, "over_shared": over_shared}
    print_line({"benchmark": "attention", **surroundings(), **result})


if __name__ == "__main__":
    main()
