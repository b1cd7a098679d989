"""Where a round of many slots goes on a GPU, in milliseconds.

    python -m benchmarks.round [--slots 64 32] [--width 8] [--context 300] [--capacity 512] [--toy]

`propose`, `verify` and `extend` are passes of one kind, each waited for; `build_ms` is what the
host takes to prepare one. `read` are whole rounds, of which the host reads each before it prepares
the next; `ahead` the same, but with the next drafts on the device before it reads, as the engine
does where it cannot send the whole round; `unread` rounds of which it reads none. `plain_read` and
`plain_unread` are steps of one token. Where MLX writes into buffers that are in use, it copies
them: `writes` shows what that costs. `products` are all matrices of the
target's layers; `joined` the same with those of one input in one product. `launches` are the
kernels of each pass by kind, counted in its graph. `apart` has of each pass, and of a step of one
token (`plain`), what the device takes and what the host takes to launch it: on CUDA a kernel that
only waits keeps the device busy meanwhile, so neither waits for the other.

Weights are random (`benchmarks.random_pair`). Medians; one JSON line.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path

import mlx.core as mx

from benchmarks.common import print_line, surroundings
from benchmarks.random_pair import SIZES, random_pair
from dspark_batch.engine.passes import Passes
from dspark_batch.numerics.rules import Greedy

CHAIN, TIMES = 12, 4
WAIT_MS = 60  # longer than any host takes to launch a pass
PASSES = ("propose", "verify", "extend")
WHOLE = ("read", "ahead", "unread", "plain_read", "plain_unread")
# Primitives that hand no kernel to the device.
VIEWS = {
    *("AsStrided", "Broadcast", "Depends", "ExpandDims", "Flatten", "Full", "Reshape", "Slice"),
    *("Split", "Squeeze", "Transpose", "Unflatten"),
}


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
        self.cache = self._filled(self.pair.target)
        self.context = self._filled(self.pair.drafter)
        self.anchors = mx.arange(self.slots, dtype=mx.int32)
        tokens = mx.zeros((self.slots, self.options.width), dtype=mx.int32)
        _, self.features = self.passes.run(self.cache, tokens)
        self.passes.extend(self.context, self.features)
        mx.eval(self.features, self.cache.arrays(), self.context.arrays())

    def _filled(self, model):
        cache = model.make_cache(self.slots, self.options.capacity)
        spread = mx.arange(self.slots, dtype=mx.int32) % 64
        cache.lengths = spread + self.options.context - 32
        return cache

    def propose(self):
        """Draft from the anchors."""
        self.proposed = self.passes.propose(self.context, self.anchors, self.num_drafts, Greedy())
        return [self.proposed.tokens, self.proposed.is_sane]

    def verify(self):
        """Verify the last drafts."""
        tokens = mx.concatenate([self.anchors[:, None], self.proposed.tokens], axis=1)
        arguments = (tokens, self.verify_len, self.num_drafts, Greedy())
        self.verified = self.passes.verify(self.cache, *arguments)
        self.features = self.verified.features
        return [*self.verified[:3], *self.cache.arrays()]

    def plain(self):
        """Run a step of one token."""
        tokens, drafts = self.anchors[:, None], mx.zeros((self.slots,), dtype=mx.int32)
        self.verified = self.passes.verify(self.cache, tokens, drafts, 0, Greedy())
        return [*self.verified[:3], *self.cache.arrays()]

    def plain_unread(self):
        """Run a step of one token, and move on."""
        arrays = self.plain()
        self.passes.keep(self.cache, mx.ones((self.slots,), dtype=mx.int32))
        self.anchors = mx.minimum(self.verified.bonus, 999)
        mx.async_eval([*arrays, *self.cache.arrays(), self.anchors])
        return arrays

    def plain_read(self):
        """Run a step of one token, and wait for it."""
        arrays = self.plain_unread()
        self.verified.bonus.tolist()
        return arrays

    def extend(self):
        """Take the features into the drafter's context."""
        self.passes.extend(self.context, self.features)
        return self.context.arrays()

    def unread(self):
        """Do all three, and move on by one token."""
        mx.async_eval(self.propose())
        return self._rest()

    def _rest(self):
        arrays = self.verify() + self.extend()
        counts = mx.minimum(self.verified.accepted, 0) + 1
        self.passes.keep(self.cache, counts)
        self.context.keep(counts)
        self.anchors = mx.minimum(self.verified.bonus, 999)
        arrays = [*arrays, self.anchors]
        mx.async_eval(arrays)
        return arrays

    def read(self):
        """Do a round and wait for it."""
        arrays = self.unread()
        self.verified.accepted.tolist()
        return arrays

    def ahead(self):
        """Do the second half of a round, and the first of the next, and wait between them."""
        mx.async_eval(self.propose())
        self.verified.accepted.tolist()
        return self._rest()


def timed(call, *, waits):
    """Time calls, in milliseconds each; and the host's part of it."""
    for _ in range(2):
        mx.eval(call())
    times, hosts = [], []
    for _ in range(TIMES):
        mx.synchronize()
        began, host = time.perf_counter(), 0.0
        for _ in range(CHAIN):
            arrays = None  # buffers that somebody holds are copied instead of written in place
            prepared = time.perf_counter()
            arrays = call()
            host += time.perf_counter() - prepared
            (mx.eval if waits else mx.async_eval)(arrays)
        mx.synchronize()
        times.append(1e3 * (time.perf_counter() - began) / CHAIN)
        hosts.append(1e3 * host / CHAIN)
    return {"ms": round(statistics.median(times), 2), "build_ms": round(min(hosts), 2)}


def apart(call):
    """Time a call on the device and on the host, in milliseconds each; None but on CUDA."""
    if not mx.cuda.is_available():
        return None
    alone = statistics.median(_behind_a_wait(list)[0] for _ in range(TIMES))
    mx.eval(call())
    found = [_behind_a_wait(call) for _ in range(TIMES + 1)]
    device_ms, host_ms = (statistics.median(times) for times in zip(*found, strict=True))
    return {"device_ms": round(device_ms - alone, 2), "host_ms": round(host_ms, 2)}


def _behind_a_wait(call):
    """Launch a call while the device waits; milliseconds until both are over, and of the host."""
    mx.synchronize()
    began = time.perf_counter()
    (wait,) = _waiting()(
        inputs=[mx.array([WAIT_MS], dtype=mx.int32)],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
    )
    mx.async_eval(wait)
    prepared = time.perf_counter()
    arrays = call()
    mx.async_eval(arrays)
    launched = time.perf_counter()
    arrays = None
    mx.synchronize()
    return 1e3 * (time.perf_counter() - began), 1e3 * (launched - prepared)


@cache
def _waiting():
    return mx.fast.cuda_kernel(
        name="dspark_batch_wait",
        input_names=["ms"],
        output_names=["out"],
        source="""
            unsigned long long began, now;
            asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
            do {
                asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
            } while (now - began < 1000000ull * ms[0]);
            out[0] = 1;
        """,
    )


def launches(arrays):
    """Count the kernels that make arrays which nobody has evaluated, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), arrays)
        names = re.findall(r'label ="([^"]+)", shape=rectangle', path.read_text())
    mx.eval(arrays)
    # What `mx.compile` joins has a long name, made of all that is in it.
    kinds = Counter("Compiled" if len(name) > 24 else name for name in names if name not in VIEWS)
    return {"all": kinds.total(), **dict(kinds.most_common())}


def writes(bench, size, *, waits):
    """Time the writes of a pass into the buffers of all layers."""
    slots, width = bench.slots, bench.options.width
    shape = slots, size.kv_heads, bench.options.capacity, size.head_dim
    dtype = bench.pair.target.model.lm_head.weight.dtype
    buffers = [mx.zeros(shape, dtype=dtype) for _ in range(2 * size.layers)]
    new = mx.ones((slots, size.kv_heads, width, size.head_dim), dtype=dtype)
    index = (bench.cache.lengths[:, None] + mx.arange(width))[:, None, :, None]

    @mx.compile
    def written(buffers, new, index):
        return [mx.put_along_axis(buffer, index, new, axis=2) for buffer in buffers]

    def call():
        buffers[:] = written(buffers, new, index)
        return buffers

    return timed(call, waits=waits)["ms"]


def products(bench, size):
    """Time all matrices of the layers, as they are and joined where they read the same."""
    layers = bench.pair.target.model.model.layers
    dtype = bench.pair.target.model.lm_head.weight.dtype
    hidden = mx.ones((bench.slots, bench.options.width, size.hidden), dtype=dtype)

    def plain(hidden):
        for layer in layers:
            each, mlp = layer.self_attn, layer.mlp
            q, k, v = each.q_proj(hidden), each.k_proj(hidden), each.v_proj(hidden)
            hidden = each.o_proj(q) + (k[..., :1] + v[..., :1])
            hidden = mlp.down_proj(mlp.gate_proj(hidden) + mlp.up_proj(hidden))
        return hidden

    qkv = [_joined(each.self_attn, "q_proj", "k_proj", "v_proj") for each in layers]
    gate_up = [_joined(each.mlp, "gate_proj", "up_proj") for each in layers]
    cuts = [size.heads * size.head_dim, (size.heads + size.kv_heads) * size.head_dim]

    def joined(hidden):
        for n, layer in enumerate(layers):
            q, k, v = mx.split(hidden @ qkv[n], cuts, axis=-1)
            hidden = layer.self_attn.o_proj(q) + (k[..., :1] + v[..., :1])
            hidden = layer.mlp.down_proj(sum(mx.split(hidden @ gate_up[n], 2, axis=-1)))
        return hidden

    found = {"products": plain, "joined": joined}
    return {
        name: timed(partial(mx.compile(call), hidden), waits=True)["ms"]
        for name, call in found.items()
    }


def _joined(module, *names):
    matrix = mx.concatenate([module[name].weight for name in names]).T
    mx.eval(matrix)
    return matrix


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
        counted = {name: launches(getattr(bench, name)()) for name in PASSES}
        bench.reset()
        bench.propose()
        found[slots] = {"launches": counted}
        for part in (*PASSES, *WHOLE):
            if part in WHOLE:
                bench.reset()  # they move on, and room is bounded
                bench.propose()
            found[slots][part] = timed(getattr(bench, part), waits=part in PASSES)
        found[slots]["apart"] = {name: apart(getattr(bench, name)) for name in (*PASSES, "plain")}
        found[slots]["writes"] = writes(bench, SIZES[name], waits=True)
        found[slots]["writes, unread"] = writes(bench, SIZES[name], waits=False)
        found[slots] |= products(bench, SIZES[name])
        print(slots, found[slots], file=sys.stderr, flush=True)
    sizes = {"width": options.width, "context": options.context, "capacity": options.capacity}
    print_line({"benchmark": "round", **surroundings(), "sizes": name, **sizes, "slots": found})


if __name__ == "__main__":
    main()
