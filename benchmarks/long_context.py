"""What long contexts cost in few slots: attention alone, a round, a prompt; and whether bits stay.

    python -m benchmarks.long_context [--slots 1 4] [--contexts 1024 4096 16384 32768] [--width 8]
                                      [--parts attention round prompt] [--size 4b] [--toy]

`attention` times one layer in a chain of layers, in microseconds: `products` are MLX's over blocks
of positions; on CUDA `whole` is our kernel with one block of threads for each key head of a slot,
`split` the same over as many as the rule says. Heads are those of Qwen3-4B and of Qwen3.5-4B.
`same` says whether the bits are equal for other numbers of splits, and for a slot alone. `round`
times whole rounds of a random pair, as `benchmarks.round` does, with and without splits. `prompt`
runs one prompt of each length through the target: seconds, the peak of the memory beside the
weights, and what the cache takes. One JSON line.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from functools import partial
from statistics import median
from types import SimpleNamespace

import mlx.core as mx

from benchmarks.common import print_line, surroundings
from benchmarks.random_pair import random_pair
from benchmarks.round import Bench, timed
from dspark_batch import device
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import prefill_alone
from dspark_batch.engine.shapes import Shapes
from dspark_batch.numerics import attention
from dspark_batch.numerics.attention import BLOCK, attention_by_kernel, products_attention
from dspark_batch.numerics.masks import ragged_causal

HEADS = {"qwen3": (32, 8, 128), "qwen3.5": (16, 4, 256)}  # query heads, key heads, their size
TOY_HEADS = {"toy": (4, 2, 16)}
LAYERS, BUFFERS, TIMES = 16, 4, 5


def products(queries, keys, values, mask, lengths):
    """Attend by MLX's products over blocks of positions."""
    return products_attention(queries, keys, values, queries.shape[-1] ** -0.5, mask)


def kernel(queries, keys, values, mask, lengths, splits=None):
    """Attend by our kernel."""
    scale = queries.shape[-1] ** -0.5
    return attention_by_kernel(queries, keys, values, scale, mask, lengths, splits=splits)


def ways():
    """List what can run here."""
    found = {"products": products}
    if device.is_cuda():
        found |= {"whole": partial(kernel, splits=1), "split": kernel}
    return found


def drawn(heads, slots, width, context, dtype):
    """Draw queries, keys and values; slots end at different places, the last one at `context`."""
    query_heads, kv_heads, dim = heads
    capacity = -(-(context + width) // BLOCK) * BLOCK
    keys = mx.random.split(mx.random.key(slots + context), 3)
    shapes = [(query_heads, width), (kv_heads, capacity), (kv_heads, capacity)]
    arrays = [
        mx.random.normal((slots, count, places, dim), key=key).astype(dtype)
        for (count, places), key in zip(shapes, keys, strict=True)
    ]
    lengths = mx.array([context - 7 * (slots - 1 - n) for n in range(slots)], dtype=mx.int32)
    mx.eval(arrays, lengths)
    return arrays, lengths


def layer_us(way, arrays, lengths):
    """Time a chain of layers, each of which takes its queries from the one before."""
    queries, keys, values = arrays
    buffers = [(keys + n, values + n) for n in range(BUFFERS)]
    mx.eval(buffers)

    @mx.compile
    def chain(queries, lengths, buffers):
        mask = ragged_causal(lengths, queries.shape[2], keys.shape[2])
        for layer in range(LAYERS):
            queries = 0.5 * way(queries, *buffers[layer % BUFFERS], mask, lengths)
        return queries

    mx.eval(chain(queries, lengths, buffers))
    times = []
    for _ in range(TIMES):
        began = time.perf_counter()
        mx.eval(chain(queries, lengths, buffers))
        times.append(time.perf_counter() - began)
    return round(1e6 * median(times) / LAYERS, 1)


def keeps_bits(arrays, lengths):
    """Say whether other splits, and other slots, change no bit."""
    queries, keys, _ = arrays
    mask = ragged_causal(lengths, queries.shape[2], keys.shape[2])
    alone = slice(queries.shape[0] // 2, queries.shape[0] // 2 + 1)
    one = [each[alone] for each in (*arrays, mask, lengths)]
    if not device.is_cuda():
        known = products(*arrays, mask, lengths)
        return {"alone": mx.array_equal(products(*one), known[alone]).item()}
    known = kernel(*arrays, mask, lengths, splits=1)
    pieces = keys.shape[2] // BLOCK
    same = {
        f"{splits} splits": mx.array_equal(kernel(*arrays, mask, lengths, splits), known).item()
        for splits in sorted({2, 3, 7, pieces})
    }
    same["alone"] = mx.array_equal(kernel(*one), known[alone]).item()
    error = mx.abs(known.astype(mx.float32) - products(*arrays, mask, lengths)).max().item()
    return same | {"from products": round(error, 5)}


def attention_part(options, dtype):
    """Time attention alone."""
    for name, heads in (TOY_HEADS if options.toy else HEADS).items():
        for slots in options.slots:
            for context in options.contexts:
                arrays, lengths = drawn(heads, slots, options.width, context, dtype)
                us = {way: layer_us(run, arrays, lengths) for way, run in ways().items()}
                sizes = {"heads": name, "slots": slots, "context": context}
                yield {**sizes, "us": us, "same": keeps_bits(arrays, lengths)}


@contextmanager
def without_splits():
    """Let one block of threads do all positions of a key head."""
    before, attention._FEW_BLOCKS = attention._FEW_BLOCKS, 0
    try:
        yield
    finally:
        attention._FEW_BLOCKS = before


def round_part(options, dtype):
    """Time whole rounds."""
    pair, _ = random_pair("toy" if options.toy else options.size, dtype)
    for slots in options.slots:
        for context in options.contexts:
            sizes = SimpleNamespace(
                width=options.width, context=context, capacity=context + 32 * options.width
            )
            found = {"slots": slots, "context": context}
            found["split"] = timed(Bench(sizes, pair, slots).read, waits=False)["ms"]
            with without_splits():
                found["whole"] = timed(Bench(sizes, pair, slots).read, waits=False)["ms"]
            yield found


def prompt_part(options, dtype):
    """Run prompts through the target."""
    pair, _ = random_pair("toy" if options.toy else options.size, dtype)
    mx.eval(pair.target.model.parameters())
    passes = Passes(pair.target, NoDrafter())
    for context in options.contexts:
        prompt = [n % 500 for n in range(context)]
        mx.clear_cache()
        weights = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        filled = prefill_alone(passes, Shapes(), prompt)
        mx.eval(filled.logits, filled.cache.arrays())
        seconds = time.perf_counter() - began
        cache = filled.cache.bytes_per_position * filled.cache.capacity
        peak = mx.get_peak_memory() - weights
        yield {"tokens": context, "s": round(seconds, 2), "peak_bytes": peak, "cache_bytes": cache}


PARTS = {"attention": attention_part, "round": round_part, "prompt": prompt_part}


def main():
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--size", default="4b")
    parser.add_argument("--toy", action="store_true", help="a tiny pair, to try this on a CPU")
    options = parser.parse_args()
    dtype = mx.float32 if options.toy else mx.bfloat16
    found = {}
    for part in options.parts:
        found[part] = []
        for reading in PARTS[part](options, dtype):
            print(part, reading, file=sys.stderr, flush=True)
            found[part].append(reading)
    print_line({"benchmark": "long_context", **surroundings(), **found})


if __name__ == "__main__":
    main()
