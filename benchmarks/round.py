"""Where a round of many slots goes on a GPU, in milliseconds: its passes, and the target's parts.

    python -m benchmarks.round [--slots 64 32] [--width 8] [--context 300] [--capacity 512] [--toy]

Each pass runs many times one behind the other, with the device asked to finish only at the end:
what is measured is the slower of host and device. `build_ms` is what the host takes to prepare it.
`round` are whole rounds that follow each other without the host reading one; `read` with it, as the
engine does. `parts` are the operations of all layers of the target's pass, each kind compiled by
itself. Weights are random (`benchmarks.random_pair`). Medians; readings to stderr, one JSON line.
"""

import argparse
import statistics
import sys
import time

import mlx.core as mx

from benchmarks.common import print_line, surroundings
from benchmarks.random_pair import SIZES, random_pair
from dspark_batch.engine.cache import RaggedCache
from dspark_batch.engine.passes import Passes
from dspark_batch.numerics.attention import folded_attention
from dspark_batch.numerics.rules import Greedy

CHAIN, TIMES = 12, 4


class Bench:
    """A pair whose slots hold a context."""

    def __init__(self, options, pair, slots):
        self.options, self.pair, self.slots = options, pair, slots
        self.passes = Passes(pair.target, pair.drafter)
        self.num_drafts = options.width - 1
        self.verify_len = mx.full((slots,), self.num_drafts, dtype=mx.int32)
        self.padding = mx.zeros((slots, 0), dtype=mx.int32)
        self.reset()

    def reset(self):
        """Put every slot back to its context."""
        self.cache = self._filled(self.pair.target.num_caches)
        self.context = self._filled(self.pair.drafter.num_layers)
        self.anchors = mx.arange(self.slots, dtype=mx.int32)
        tokens = mx.zeros((self.slots, self.options.width), dtype=mx.int32)
        _, self.features = self.passes.run(self.cache, tokens)
        self.passes.extend(self.context, self.features)
        mx.eval(self.features, self.cache.arrays(), self.context.arrays())

    def _filled(self, layers):
        cache = RaggedCache(layers, self.slots, folds=True)
        cache.reserve(self.options.capacity)
        spread = mx.arange(self.slots, dtype=mx.int32) % 64
        cache.lengths = spread + self.options.context - 32
        return cache

    def propose(self):
        """Draft."""
        self.proposed = self.passes.propose(self.context, self.anchors, self.num_drafts, Greedy())
        return [self.proposed.tokens, self.proposed.is_sane]

    def verify(self):
        """Verify the last drafts."""
        tokens = mx.concatenate([self.anchors[:, None], self.proposed.tokens], axis=1)
        arguments = (tokens, self.verify_len, self.num_drafts, Greedy())
        self.verified = self.passes.verify(self.cache, *arguments)
        self.features = self.verified.features
        return [*self.verified[:3], *self.cache.arrays()]

    def extend(self):
        """Take the features into the drafter's context."""
        self.passes.extend(self.context, self.features)
        return self.context.arrays()

    def round(self):
        """Do all three, and move on by one token."""
        mx.async_eval(self.propose())
        arrays = self.verify() + self.extend()
        counts = mx.minimum(self.verified.accepted, 0) + mx.where(self.anchors >= 0, 0, 1)
        self.cache.keep(counts)
        self.context.keep(counts)
        self.anchors = mx.minimum(self.verified.bonus, 999)
        return [*arrays, self.anchors]

    def read(self):
        """Do a round and wait for it."""
        arrays = self.round()
        mx.async_eval(arrays)
        self.verified.accepted.tolist()
        return arrays


def chained(call):
    """Time calls one behind the other, in milliseconds each; and the host's part of it."""
    for _ in range(2):
        mx.eval(call())
    times, hosts = [], []
    for _ in range(TIMES):
        mx.synchronize()
        began, host = time.perf_counter(), 0.0
        for _ in range(CHAIN):
            prepared = time.perf_counter()
            arrays = call()
            host += time.perf_counter() - prepared
            mx.async_eval(arrays)
        mx.synchronize()
        times.append(1e3 * (time.perf_counter() - began) / CHAIN)
        hosts.append(1e3 * host / CHAIN)
    return {"ms": round(statistics.median(times), 2), "build_ms": round(min(hosts), 2)}


def parts(bench, size):  # noqa: C901, PLR0915  an experiment, part by part
    """Time the operations of all layers, each kind compiled by itself."""
    slots, width, room = bench.slots, bench.options.width, bench.options.capacity
    dtype = bench.pair.target.model.lm_head.weight.dtype
    heads, kv, dim = size.heads, size.kv_heads, size.head_dim
    draw = lambda *shape: mx.random.normal(shape).astype(dtype)  # noqa: E731
    hidden, new = draw(slots, width, size.hidden), draw(slots, kv, width, dim)
    buffers = [draw(slots, kv, room, dim) for _ in range(2 * size.layers)]
    queries = draw(slots, heads, width, dim)
    lengths = mx.zeros(slots, dtype=mx.int32) + bench.options.context
    mask = mx.arange(room) <= (lengths[:, None] + mx.arange(width))[:, None, :, None]
    layers = bench.pair.target.model.model.layers

    def attention(queries):
        for n in range(size.layers):
            queries = folded_attention(queries, buffers[2 * n], buffers[2 * n + 1], 0.1, mask)
        return [queries]

    def products(hidden):
        for layer in layers:
            each, mlp = layer.self_attn, layer.mlp
            q, k, v = each.q_proj(hidden), each.k_proj(hidden), each.v_proj(hidden)
            hidden = each.o_proj(q) + (k[..., :1] + v[..., :1])
            hidden = mlp.down_proj(mlp.gate_proj(hidden) + mlp.up_proj(hidden))
        return [hidden]

    joined = [
        (
            mx.concatenate([getattr(each.self_attn, f"{n}_proj").weight for n in "qkv"]).T,
            mx.concatenate([each.mlp.gate_proj.weight, each.mlp.up_proj.weight]).T,
        )
        for each in layers
    ]
    mx.eval(joined)

    def products_joined(hidden):
        cuts = [heads * dim, heads * dim + kv * dim]
        for layer, (qkv, gate_up) in zip(layers, joined, strict=True):
            q, k, v = mx.split(hidden @ qkv, cuts, axis=-1)
            hidden = layer.self_attn.o_proj(q) + (k[..., :1] + v[..., :1])
            hidden = layer.mlp.down_proj(sum(mx.split(hidden @ gate_up, 2, axis=-1)))
        return [hidden]

    def by_position(buffers, new):
        index = (lengths[:, None] + mx.arange(width))[:, None, :, None]
        return [mx.put_along_axis(buffer, index, new, axis=2) for buffer in buffers]

    def by_slot(buffers, new):
        place = lengths[:, None] + mx.arange(width)
        where = mx.arange(slots)[:, None, None], mx.arange(kv)[:, None], place[:, None]
        written = []
        for buffer in buffers:
            buffer[where] = new
            written.append(buffer)
        return written

    def norms(hidden):
        for layer in layers:
            hidden = layer.post_attention_layernorm(layer.input_layernorm(hidden))
        return [hidden]

    def ropes(queries):
        for layer in layers:
            queries = layer.self_attn.rope(queries, offset=lengths)
        return [queries]

    found = {}
    pure = {"products": (products, hidden), "attention": (attention, queries)}
    pure |= {"products, joined": (products_joined, hidden)}
    pure |= {"norms": (norms, hidden), "ropes of queries": (ropes, queries)}
    for name, (call, given) in pure.items():
        compiled = mx.compile(call)
        found[name] = chained(lambda compiled=compiled, given=given: compiled(given))["ms"]
    for name, call in {"writes": by_position, "writes by slot": by_slot}.items():
        compiled = mx.compile(call)

        def write(compiled=compiled):
            buffers[:] = compiled(buffers, new)
            return buffers

        found[name] = chained(write)["ms"]
    return found


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="*", default=[64, 32])
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--context", type=int, default=300, help="cached tokens a slot, on average")
    parser.add_argument("--capacity", type=int, default=512)
    parser.add_argument("--toy", action="store_true", help="a tiny pair, to try this on a CPU")
    options = parser.parse_args()
    name = "toy" if options.toy else "4b"
    pair, _ = random_pair(name, mx.float32 if options.toy else mx.bfloat16)
    found = {}
    for slots in options.slots:
        bench = Bench(options, pair, slots)
        calls = ("propose", "verify", "extend", "round", "read")
        found[slots] = {call: chained(getattr(bench, call)) for call in calls}
        found[slots]["parts"] = parts(bench, SIZES[name])
        print(slots, found[slots], file=sys.stderr, flush=True)
    sizes = {"width": options.width, "context": options.context, "capacity": options.capacity}
    print_line({"benchmark": "round", **surroundings(), "sizes": name, **sizes, "slots": found})


if __name__ == "__main__":
    main()
