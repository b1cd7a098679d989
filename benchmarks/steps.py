"""What a step of a real size costs on this device, by the way it is run; an experiment.

    python -m benchmarks.steps [--parts rates target drafter checks bits prefill prefill_bits
                                        attention matmuls writes] [--toy]
                               [--shapes 64x8 64x1] [--capacities 512 1024] [--repeats 10]

Prints every reading to stderr as soon as it is there, and one JSON line at the end. `ms` is the
median of a step, `host_ms` the part of it until the graph is built and the device is asked.

`stock` attends with the model's own masked kernel, `folded` with `benchmarks.folding`; `eager`
builds its graph each time, `compiled` is one `mx.compile` whose arguments and results hold the
caches' buffers. `extra_gb` is memory that a step takes above what is there before it.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from statistics import median

import mlx.core as mx

from benchmarks.common import print_line, surroundings
from benchmarks.folding import folded, folded_attention
from benchmarks.random_pair import SIZES, num_parameters, random_pair
from benchmarks.rates import measured_rates, nominal_rates
from dspark_batch.engine.cache import RaggedCache
from dspark_batch.engine.fallback import is_sane
from dspark_batch.models.dspark import Draft
from dspark_batch.numerics.rules import Greedy

SHAPES = ("64x8", "64x1", "64x4", "32x8", "32x1")
MEAN_CONTEXT = 400


class Bench:
    """The pair, the options, and where readings go."""

    def __init__(self, options):
        self.options = options
        self.is_toy = options.toy
        self.size = SIZES["toy" if options.toy else "4b"]
        self.dtype = mx.float32 if options.toy else mx.bfloat16
        self.pair, self.follower = random_pair("toy" if options.toy else "4b", self.dtype)
        self.readings = []

    def read(self, part, **reading):
        """Keep a reading and show it."""
        self.readings.append({"part": part, **reading})
        print(json.dumps(self.readings[-1]), file=sys.stderr, flush=True)

    def attempt(self, part, measure, **where):
        """Take a reading of what may fail; what fails says so and leaves the rest alone."""
        try:
            self.read(part, **where, **measure())
        except (RuntimeError, ValueError) as error:
            self.read(part, **where, failed=f"{type(error).__name__}: {error}")
        mx.clear_cache()

    def attending(self, attention):
        """Let the pair attend so, for a while."""
        pair = self.pair
        return folded(pair.target.model, pair.drafter) if attention == "folded" else nullcontext()

    def time(self, run):
        """Time a step that returns what to evaluate; see the module."""
        times, host = [], []
        for number in range(2 + self.options.repeats):
            mx.synchronize()
            began = time.perf_counter()
            results = run()
            built = time.perf_counter()
            mx.eval(results)
            mx.synchronize()
            if number >= 2:
                times.append(time.perf_counter() - began)
                host.append(built - began)
            del results
        return {
            "ms": round(1e3 * median(times), 3),
            "min_ms": round(1e3 * min(times), 3),
            "host_ms": round(1e3 * median(host), 3),
        }

    def memory(self, run):
        """Tell what one step takes above what is there before it."""
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        results = run()
        mx.eval(results)
        mx.synchronize()
        return {"extra_gb": round((mx.get_peak_memory() - before) / 1e9, 4)}


class Slots:
    """A batch in mid-answer: buffers that random keys and values fill, and where each slot is."""

    def __init__(self, bench, slots, capacity):
        size = bench.size
        mean = min(MEAN_CONTEXT, capacity * 3 // 4)
        self.lengths = _lengths(slots, mean, min(mean // 3, capacity - mean - 16))
        self.tokens = _tokens(bench, slots)
        self.buffers = _noise(bench, size.layers, slots, capacity)
        self.context = _noise(bench, size.draft_layers, slots, capacity)
        shape = (slots, 8, len(size.taps) * size.hidden)
        self.features = mx.random.normal(shape, key=mx.random.key(5)).astype(bench.dtype)
        mx.eval(self.lengths, self.tokens, self.buffers, self.context, self.features)

    @property
    def cache_gb(self):
        """The size of the target's buffers."""
        return round(sum(buffer.nbytes for buffer in self.buffers) / 1e9, 4)


def _noise(bench, layers, slots, capacity):
    """Draw keys and values of all layers."""
    shape, buffers = (slots, bench.size.kv_heads, capacity, bench.size.head_dim), []
    for number in range(2 * layers):
        drawn = mx.random.normal(shape, dtype=bench.dtype, key=mx.random.key(number))
        buffers.append(drawn)
        mx.eval(drawn)
    return buffers


def _lengths(slots, mean, spread):
    """Give slots other lengths around a mean."""
    return mean - spread + mx.arange(slots, dtype=mx.int32) * 37 % (2 * spread + 1)


def _tokens(bench, slots):
    """Give each slot eight tokens."""
    return mx.arange(slots * 8, dtype=mx.int32).reshape(slots, 8) * 71 % bench.size.vocabulary


def shell(lengths, buffers):
    """Make the engine's cache around some buffers."""
    cache = RaggedCache(len(buffers) // 2, lengths.shape[0])
    cache.lengths, cache.capacity = lengths, buffers[0].shape[2]
    for number, layer in enumerate(cache.layers):
        layer.keys, layer.values = buffers[2 * number : 2 * number + 2]
    return cache


def buffers_of(cache):
    """Take the buffers out of a cache, keys and values in turns.

    A cache and its layers know each other, so one that is dropped keeps its buffers until Python
    collects cycles, and the next step would have to copy them.
    """
    buffers = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values)]
    for layer in cache.layers:
        layer.keys = layer.values = None
    return buffers


# The functions below take and return arrays only, so they run as they are and compiled.


def target_step(bench, tokens, lengths, *buffers):
    """Run the target; returns its choices, the features, and the new buffers."""
    cache = shell(lengths, buffers)
    logits, features = bench.pair.target(tokens, cache.layers)
    return [mx.argmax(logits, axis=-1), features, *buffers_of(cache)]


def logits_step(bench, tokens, lengths, *buffers):
    """Run the target; returns its logits, the features, and the new buffers."""
    cache = shell(lengths, buffers)
    logits, features = bench.pair.target(tokens, cache.layers)
    return [logits, features, *buffers_of(cache)]


def draft_step(bench, with_check, anchors, lengths, *buffers):
    """Draft a block; returns the drafts, whether they come from numbers, and the new buffers."""
    context = shell(lengths, buffers)
    draft = bench.pair.drafter.propose(anchors, context, bench.size.block, Greedy().draft)
    sane = is_sane(draft) if with_check else mx.ones_like(anchors)
    return [draft.tokens.astype(mx.int32), sane, *buffers_of(context)]


def extend_step(bench, lengths, features, *buffers):
    """Take features into the drafter's context; returns the new buffers."""
    context = shell(lengths, buffers)
    bench.pair.drafter.extend(context, features)
    return buffers_of(context)


def verify_step(bench, check, anchors, drafts, lengths, *buffers):
    """Verify, accept, extend, keep; returns five results and the new buffers of both caches."""
    num_target = 2 * bench.size.layers
    tokens = mx.concatenate([anchors[:, None], drafts], axis=1)
    cache, context = shell(lengths, buffers[:num_target]), shell(lengths, buffers[num_target:])
    logits, features = bench.pair.target(tokens, cache.layers)
    verify_len = mx.full(anchors.shape, drafts.shape[1])
    accepted, bonus = Greedy().verify(drafts, verify_len, logits)
    bench.pair.drafter.extend(context, features)
    finite = check(logits)
    kept = lengths + accepted + 1
    return [accepted, bonus, finite, kept, *buffers_of(cache), *buffers_of(context)]


def round_step(bench, check, with_check, anchors, lengths, *buffers):
    """Run a whole round as one function of arrays."""
    num_target = 2 * bench.size.layers
    drafts, sane, *context = draft_step(bench, with_check, anchors, lengths, *buffers[num_target:])
    verified = verify_step(bench, check, anchors, drafts, lengths, *buffers[:num_target], *context)
    return [drafts, sane, *verified]


def all_finite(logits):
    """Check every logit, as the engine does."""
    return _rows_finite(logits)


def choice_finite(logits):
    """Check the largest logit only."""
    return mx.isfinite(logits.max(axis=-1))


def no_check(logits):
    """Check nothing."""
    return mx.ones(logits.shape[:2], dtype=mx.bool_)


# Part by part


def part_rates(bench):
    """Read the device's matrix rate and bandwidth, and what a pass has to read and compute."""
    rate, bandwidth = measured_rates(bench.is_toy)
    nominal = nominal_rates()
    pair = bench.pair
    bench.read(
        "rates",
        matmul_tflops=round(rate / 1e12, 3),
        copy_gb_per_s=round(bandwidth / 1e9, 1),
        nominal=nominal and {"tflops": nominal[0] / 1e12, "gb_per_s": nominal[1] / 1e9},
        target_matrices=num_parameters(pair.target.model, "embed_tokens"),
        drafter_matrices=num_parameters(pair.drafter, "markov_w1"),
    )


def part_target(bench):
    """Time the target's step for each shape, capacity and way of running it."""
    for capacity in bench.options.capacities:
        for shape in bench.options.shapes:
            slots, width = map(int, shape.split("x"))
            for attention in ("stock", "folded"):
                for mode in ("eager", "compiled"):
                    where = {"slots": slots, "width": width, "capacity": capacity}
                    measure = partial(_time_target, bench, **where, mode=mode)
                    with bench.attending(attention):
                        bench.attempt("target", measure, **where, way=f"{attention} {mode}")


def _time_target(bench, slots, width, capacity, mode):
    state = Slots(bench, slots, capacity)
    step = partial(target_step, bench)
    step = mx.compile(step) if mode == "compiled" else step
    tokens = state.tokens[:, :width]

    def run():
        choice, features, *state.buffers = step(tokens, state.lengths, *state.buffers)
        return [choice, features, *state.buffers]

    return _whole(bench, run) | {"cache_gb": state.cache_gb}


def part_drafter(bench):
    """Time the drafter alone, then whole rounds, as one function and as two."""
    capacity = min(bench.options.capacities)
    for slots in sorted({int(shape.split("x")[0]) for shape in bench.options.shapes}):
        for attention in ("stock", "folded"):
            for mode in ("eager", "compiled"):
                state = Slots(bench, slots, capacity)
                where = {"slots": slots, "capacity": capacity, "way": f"{attention} {mode}"}
                with bench.attending(attention):
                    _time_drafter(bench, state, mode, where)
                    _time_rounds(bench, state, mode, where)
                del state


def _time_drafter(bench, state, mode, where):
    made = mx.compile if mode == "compiled" else lambda function: function
    propose = made(partial(draft_step, bench, False))
    checked = made(partial(draft_step, bench, True))
    extend = made(partial(extend_step, bench))
    anchors = state.tokens[:, 0]

    def run_propose(step):
        drafts, sane, *state.context = step(anchors, state.lengths, *state.context)
        return [drafts, sane, *state.context]

    def run_extend():
        state.context = extend(state.lengths, state.features, *state.context)
        return state.context

    for name, run in (
        ("propose", partial(run_propose, propose)),
        ("propose, is_sane", partial(run_propose, checked)),
        ("extend", run_extend),
    ):
        bench.attempt(name, partial(bench.time, run), **where)


def _time_rounds(bench, state, mode, where):
    made = mx.compile if mode == "compiled" else lambda function: function
    num_target, anchors = 2 * bench.size.layers, state.tokens[:, 0]

    def split(buffers):
        state.buffers, state.context = buffers[:num_target], buffers[num_target:]

    def run_one(step):
        *results, buffers = _cut(step(anchors, state.lengths, *taken(state)), 6)
        split(buffers)
        return [*results, *state.buffers, *state.context]

    def run_two(draft, verify):
        drafts, sane, *state.context = draft(anchors, state.lengths, *state.context)
        *results, buffers = _cut(verify(anchors, drafts, state.lengths, *taken(state)), 4)
        split(buffers)
        return [drafts, sane, *results, *state.buffers, *state.context]

    for name, check, with_check in (
        ("all", all_finite, True),
        ("largest", choice_finite, False),
        ("none", no_check, False),
    ):
        run = partial(run_one, made(partial(round_step, bench, check, with_check)))
        bench.attempt("round, one function", partial(_whole, bench, run), checks=name, **where)
    draft = made(partial(draft_step, bench, False))
    verify = made(partial(verify_step, bench, choice_finite))
    run = partial(run_two, draft, verify)
    bench.attempt("round, two functions", partial(_whole, bench, run), checks="largest", **where)


def _whole(bench, run):
    return bench.time(run) | bench.memory(run)


def taken(state):
    """Take the buffers out of a state, so that the next step may write into them."""
    buffers = [*state.buffers, *state.context]
    state.buffers = state.context = None
    return buffers


def _cut(results, count):
    """Split results into the first ones and a list of the rest."""
    return [*results[:count], results[count:]]


def part_checks(bench):
    """Time ways to see that logits are numbers, and tell what each of them sees."""
    for shape in ("64x8", "64x1"):
        slots, width = (int(n) for n in ("4x8" if bench.is_toy else shape).split("x"))
        dims = (slots, width, bench.size.vocabulary)
        logits = mx.random.normal(dims, key=mx.random.key(9)).astype(bench.dtype)
        hidden = mx.random.normal((*dims[:2], bench.size.hidden), key=mx.random.key(9))
        hidden = hidden.astype(bench.dtype)
        mx.eval(logits, hidden)
        for name, check in CHECKS.items():
            for mode, made in (("eager", lambda f: f), ("compiled", mx.compile)):
                reading = bench.time(partial(made(check), logits))
                bench.read("checks", slots=slots, width=width, check=name, way=mode, **reading)
        reading = bench.time(partial(_rows_finite, hidden))
        bench.read("checks", slots=slots, width=width, check="hidden isfinite", **reading)
        draft = Draft(mx.argmax(logits, axis=-1), logits[:, :7])
        reading = bench.time(partial(is_sane, draft))
        bench.read("checks", slots=slots, width=width, check="is_sane of 7 drafts", **reading)
    bench.read("checks", sees={name: _sees(bench, check) for name, check in CHECKS.items()})


def _rows_finite(hidden):
    return mx.isfinite(hidden).all(axis=-1)


def _both(logits, finite):
    return [mx.argmax(logits, axis=-1), finite]


def _chosen(logits):
    choice = mx.argmax(logits, axis=-1)
    return [choice, mx.isfinite(mx.take_along_axis(logits, choice[..., None], axis=-1)[..., 0])]


CHECKS = {
    "argmax alone": lambda logits: [mx.argmax(logits, axis=-1), logits[..., 0] == logits[..., 0]],
    "isfinite of all": lambda logits: _both(logits, mx.isfinite(logits).all(axis=-1)),
    "max": lambda logits: _both(logits, mx.isfinite(logits.max(axis=-1))),
    "max and min": lambda logits: _both(
        logits, mx.isfinite(logits.max(axis=-1)) & mx.isfinite(logits.min(axis=-1))
    ),
    "the chosen one": _chosen,
    "logsumexp": lambda logits: _both(logits, mx.isfinite(mx.logsumexp(logits, axis=-1))),
    "sum": lambda logits: _both(logits, mx.isfinite(logits.sum(axis=-1))),
}


def _sees(bench, check):
    """Tell which of three faults, each in one logit of a row, a check sees."""
    seen = {}
    for fault in ("nan", "inf", "-inf"):
        logits = mx.zeros((1, 1, bench.size.vocabulary), dtype=bench.dtype)
        logits[0, 0, 5] = float(fault)
        seen[fault] = not check(logits)[1].item()
    return seen


def part_bits(bench):
    """Compare the bits of rows between shapes, capacities and ways to run them."""
    most = max(shape[0] for shape in BIT_SHAPES)
    filled = _noise(bench, bench.size.layers, *_fit(bench, most, 256))
    for attention, mode in (("stock", "eager"), ("folded", "eager"), ("folded", "compiled")):
        with bench.attending(attention):
            reference = _logits(bench, filled, 64, 8, 512, mode)
            for slots, width, capacity in BIT_SHAPES:
                where = {"slots": slots, "width": width, "capacity": capacity}
                find = partial(_logits, bench, filled, **where, mode=mode)
                measure = partial(_compared, reference, find)
                bench.attempt("bits", measure, way=f"{attention} {mode}", **where)


BIT_SHAPES = (
    *((slots, 8, 512) for slots in (64, 128, 32, 16, 8, 4, 1)),
    *((64, width, 512) for width in (6, 4, 2, 1)),
    *((slots, 4, 512) for slots in (128, 32, 16)),
    *((slots, 1, 512) for slots in (32, 16, 8, 1)),
    *((64, 8, capacity) for capacity in (256, 1024, 2048)),
    *((64, 1, capacity) for capacity in (256, 1024, 2048)),
)


def _fit(bench, slots, capacity):
    """Make a shape small where everything is."""
    return (max(1, slots // 16), capacity // 8) if bench.is_toy else (slots, capacity)


def _logits(bench, filled, slots, width, capacity, mode):
    """Run one step over the first slots of what was filled."""
    slots, capacity = _fit(bench, slots, capacity)
    missing = capacity - filled[0].shape[2]
    buffers = [mx.pad(b[:slots], [(0, 0), (0, 0), (0, missing), (0, 0)]) for b in filled]
    lengths = _lengths(slots, *((16, 5) if bench.is_toy else (150, 80)))
    step = partial(logits_step, bench)
    step = mx.compile(step) if mode == "compiled" else step
    logits, _, *buffers = step(_tokens(bench, slots)[:, :width], lengths, *buffers)
    mx.eval(logits, buffers)
    return logits


def _compared(reference, find):
    """Compare the rows and positions that two logits [S, W, V] share."""
    logits = find()
    rows, width = (min(a, b) for a, b in zip(reference.shape[:2], logits.shape[:2], strict=True))
    left, right = reference[:rows, :width], logits[:rows, :width]
    apart = mx.abs(left.astype(mx.float32) - right.astype(mx.float32))
    flips = mx.argmax(left, axis=-1) != mx.argmax(right, axis=-1)
    equal = (left == right).all(axis=(1, 2)).sum().item()
    return {
        "equal": equal == rows,
        "equal_rows": f"{equal}/{rows}",
        "largest": apart.max().item(),
        "mean": apart.mean().item(),
        "flips": f"{flips.sum().item()}/{flips.size}",
    }


def part_prefill_bits(bench):
    """Compare caches and logits of the same prompts that were cut and padded in other ways."""
    chunk = 8 if bench.is_toy else 64
    prompts = mx.arange(16 * 4 * chunk).reshape(16, -1) * 131 % bench.size.vocabulary
    for attention in ("stock", "folded"):
        with bench.attending(attention):
            reference = _prefilled(bench, prompts[:8], 4 * chunk, 4 * chunk)
            for rows, length, capacity in (
                (8, 4, 4), (8, 2, 4), (8, 1, 4), (16, 4, 4), (16, 2, 4), (4, 4, 4), (1, 4, 4),
                (1, 2, 4), (1, 1, 4), (8, 2, 8), (8, 2, 16), (8, 2, 32), (1, 4, 8), (8, 4, 8),
            ):  # fmt: skip
                sizes = (length * chunk, capacity * chunk)
                find = partial(_prefilled, bench, prompts[:rows], *sizes)
                where = {"rows": rows, "chunk": sizes[0], "capacity": sizes[1]}
                measure = partial(_compared_caches, reference, find)
                bench.attempt("prefill_bits", measure, way=attention, **where)


def _prefilled(bench, prompts, chunk, capacity):
    """Prefill prompts in chunks; returns the last logits and the buffers that were written."""
    cache = RaggedCache(bench.size.layers, prompts.shape[0])
    cache.reserve(1)  # lets `capacity` be any number
    cache.capacity = capacity
    for start in range(0, prompts.shape[1], chunk):
        tokens = prompts[:, start : start + chunk]
        logits, _ = bench.pair.target(tokens, cache.layers)
        cache.keep(mx.full((prompts.shape[0],), chunk, dtype=mx.int32))
        last = logits[:, -1:]
        mx.eval(last, cache.arrays())
        del logits
    return last, [buffer[:, :, : prompts.shape[1]] for buffer in buffers_of(cache)]


def _compared_caches(reference, find):
    """Compare the rows that two prefills share."""
    found = find()
    rows = min(reference[0].shape[0], found[0].shape[0])
    apart = [
        mx.abs(a[:rows].astype(mx.float32) - b[:rows].astype(mx.float32)).max()
        for a, b in zip(reference[1], found[1], strict=True)
    ]
    layers = [value.item() for value in apart]
    return {
        "kv_equal": max(layers) == 0,
        "kv_largest": max(layers),
        "first_layer_apart": next((i // 2 for i, value in enumerate(layers) if value), None),
        **_compared(reference[0], lambda: found[0]),
    }


class WholePrompt:
    """A cache of one layer for one step over whole prompts: keeps just what is written."""

    offset = 0

    def __init__(self):
        self.keys = self.values = None

    def update_and_fetch(self, keys, values):
        """Keep and return a step's keys and values."""
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, width, return_array=False, window_size=None):
        """Let the kernel mask."""
        return "causal"


def part_prefill(bench):
    """Time prompts through the target and their features into the drafter's context."""
    shapes = ((1, 8), (4, 16)) if bench.is_toy else ((1, 128), (8, 128), (8, 256), (16, 128))
    for rows, length in shapes:
        tokens = mx.arange(rows * length).reshape(rows, length) * 131 % bench.size.vocabulary
        for way in ("masked", "folded", "causal"):
            for head in ("all", "last"):
                measure = partial(bench.time, partial(_prefill, bench, tokens, way, head))
                where = {"rows": rows, "tokens": length, "way": way, "head": head}
                with bench.attending(way):
                    bench.attempt("prefill", measure, **where)


def _prefill(bench, tokens, way, head):
    """Run prompts; the head runs over all positions, as in the engine, or over the last."""
    rows, length = tokens.shape
    target, size = bench.pair.target, bench.size
    cache, context = RaggedCache(size.layers, rows), RaggedCache(size.draft_layers, rows)
    cache.reserve(length)
    context.reserve(length)
    layers = [WholePrompt() for _ in range(size.layers)] if way == "causal" else cache.layers
    if head == "all":
        logits, features = target(tokens, layers)
        logits = logits[:, -1]
    else:
        hidden = target.model.model(tokens, list(layers))
        features = target._taps.take()
        logits = target.model.lm_head(hidden[:, -1])
    bench.pair.drafter.extend(context, features)
    buffers = [buffer for layer in layers for buffer in (layer.keys, layer.values)]
    return [mx.argmax(logits, axis=-1), *buffers, *context.arrays()]


def part_attention(bench):
    """Time attention alone, all layers one after the other, by kernel."""
    size = bench.size
    for shape in bench.options.shapes:
        slots, width = map(int, shape.split("x"))
        for capacity in bench.options.capacities:
            queries = _normal(bench, (slots, size.heads, width, size.head_dim))
            keys, values = (
                _normal(bench, (slots, size.kv_heads, capacity, size.head_dim)) for _ in range(2)
            )
            lengths = mx.full((slots,), min(MEAN_CONTEXT, capacity - width), dtype=mx.int32)
            mask = mx.arange(capacity) <= (lengths[:, None] + mx.arange(width))[:, None, :, None]
            mx.eval(queries, keys, values, mask)
            for name, attend in ATTENTIONS.items():
                chained = partial(_chain, attend, size)
                for mode, made in (("eager", lambda f: f), ("compiled", mx.compile)):
                    run = partial(made(chained), queries, keys, values, mask)
                    where = {"slots": slots, "width": width, "capacity": capacity}
                    where |= {"kernel": name, "way": mode}
                    bench.attempt("attention", partial(bench.time, run), **where)


def _normal(bench, shape):
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(bench.dtype)


def _chain(attend, size, queries, keys, values, mask):
    for _ in range(size.layers):
        queries = attend(queries, keys, values, scale=size.head_dim**-0.5, mask=mask)
    return queries


def _folded_fast(queries, keys, values, *, scale, mask):
    slots, heads, width, dim = queries.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    rows = queries.reshape(slots, kv_heads, group * width, dim)
    mask = mx.tile(mask, (1, 1, group, 1))
    attended = mx.fast.scaled_dot_product_attention(rows, keys, values, scale=scale, mask=mask)
    return attended.reshape(slots, heads, width, dim)


def _stock(queries, keys, values, *, scale, mask):
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


ATTENTIONS = {
    "stock": _stock,
    "stock, no mask": lambda q, k, v, *, scale, mask: _stock(q, k, v, scale=scale, mask=None),
    "folded": folded_attention,
    "folded, fast kernel": _folded_fast,
}


def part_matmuls(bench):
    """Time all matrices of the target over a step's tokens, as stored and joined."""
    model, size = bench.pair.target.model, bench.size
    for tokens in (8, 32) if bench.is_toy else (64, 256, 512, 1024):
        slots = max(1, tokens // 8)
        hidden = _normal(bench, (slots, tokens // slots, size.hidden))
        wide = _normal(bench, (slots, tokens // slots, size.heads * size.head_dim))
        inner = _normal(bench, (slots, tokens // slots, size.mlp))
        mx.eval(hidden, wide, inner)
        for name, used, outer in (
            ("q k v", ("q_proj", "k_proj", "v_proj"), hidden),
            ("o", ("o_proj",), wide),
            ("gate up", ("gate_proj", "up_proj"), hidden),
            ("down", ("down_proj",), inner),
        ):
            _time_matrices(bench, model, tokens, name, used, outer)
        reading = bench.time(lambda hidden=hidden: mx.argmax(model.lm_head(hidden), axis=-1))
        bench.read("matmuls", tokens=tokens, matrices="head and argmax", **reading)
        mx.clear_cache()


def _time_matrices(bench, model, tokens, name, used, hidden):
    parts = [(layer.self_attn, layer.mlp) for layer in model.layers]
    by_layer = [
        [getattr(attn if word in attn else mlp, word).weight for word in used]
        for attn, mlp in parts
    ]
    flat = hidden.reshape(-1, hidden.shape[-1])

    ways = [(name, by_layer, hidden), (f"{name}, flat", by_layer, flat)]
    if len(used) > 1:
        joined = [[mx.concatenate(layer, axis=0)] for layer in by_layer]
        mx.eval(joined)
        ways.append((f"{name}, flat and joined", joined, flat))
    for way, matrices, inputs in ways:
        measure = partial(bench.time, partial(_one_after_the_other, matrices, inputs))
        bench.attempt("matmuls", measure, tokens=tokens, matrices=way)


def _one_after_the_other(by_layer, inputs):
    """Multiply layer by layer; each waits for the one before, as in a model."""
    products = []
    for layer in by_layer:
        products += [inputs @ matrix.T for matrix in layer]
        inputs = inputs + products[-1][..., :1] * 1e-30
    return products


def part_writes(bench):
    """Time the writes of a step's keys and values into all buffers, by operation and layout."""
    size, capacity = bench.size, max(bench.options.capacities)
    for shape in bench.options.shapes:
        slots, width = map(int, shape.split("x"))
        lengths = _lengths(slots, capacity // 2, capacity // 8)
        by_head = _normal(bench, (slots, size.kv_heads, width, size.head_dim))
        by_place = by_head.swapaxes(1, 2)
        for name, (write, is_by_place) in WRITES.items():
            new = by_place if is_by_place else by_head
            dims = (capacity, size.kv_heads) if is_by_place else (size.kv_heads, capacity)
            for mode, made in (("eager", lambda f: f), ("compiled", mx.compile)):
                measure = partial(_time_writes, bench, made(write), (slots, *dims), lengths, new)
                where = {"slots": slots, "width": width, "capacity": capacity}
                bench.attempt("writes", measure, **where, write=name, way=mode)


def _time_writes(bench, write, dims, lengths, new):
    buffers = [
        mx.zeros((*dims, bench.size.head_dim), bench.dtype) for _ in range(2 * bench.size.layers)
    ]
    mx.eval(buffers, lengths, new)

    def run():
        buffers[:] = write(lengths, new, *buffers)
        return buffers.copy()

    return _whole(bench, run)


def _put_along(lengths, new, *buffers):
    """Write as the engine's cache does; buffers [S, KV, C, D]."""
    index = (lengths[:, None] + mx.arange(new.shape[2]))[:, None, :, None]
    return [mx.put_along_axis(buffer, index, new, axis=2) for buffer in buffers]


def _scatter_by_head(lengths, new, *buffers):
    """Write by index arrays over slots, heads and places; buffers [S, KV, C, D]."""
    slots, heads, width, _ = new.shape
    places = (lengths[:, None] + mx.arange(width))[:, None]
    which = (mx.arange(slots)[:, None, None], mx.arange(heads)[None, :, None], places)
    return [_set_at(buffer, which, new) for buffer in buffers]


def _scatter_by_place(lengths, new, *buffers):
    """Write by index arrays over slots and places; buffers [S, C, KV, D]."""
    slots, width = new.shape[:2]
    which = (mx.arange(slots)[:, None], lengths[:, None] + mx.arange(width))
    return [_set_at(buffer, which, new) for buffer in buffers]


def _set_at(buffer, which, new):
    written = buffer[:]  # another name for the same values: the caller's stays as it is
    written[which] = new
    return written


WRITES = {
    "put_along_axis": (_put_along, False),
    "scatter by head": (_scatter_by_head, False),
    "scatter by place": (_scatter_by_place, True),
}


PARTS = {
    "rates": part_rates,
    "target": part_target,
    "drafter": part_drafter,
    "checks": part_checks,
    "bits": part_bits,
    "prefill": part_prefill,
    "prefill_bits": part_prefill_bits,
    "attention": part_attention,
    "matmuls": part_matmuls,
    "writes": part_writes,
}


def run_parts(bench, names):
    """Run parts; one that fails says so and leaves the others alone."""
    for name in names:
        began = time.perf_counter()
        try:
            PARTS[name](bench)
        except (RuntimeError, ValueError) as error:
            bench.read(name, failed=f"{type(error).__name__}: {error}")
        mx.clear_cache()
        bench.read(name, part_s=round(time.perf_counter() - began, 2))


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="slots x width")
    parser.add_argument("--capacities", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--toy", action="store_true", help="a tiny pair, to try this on a CPU")
    options = parser.parse_args()
    if options.toy:
        options.shapes, options.capacities, options.repeats = ["4x8", "4x1", "2x8"], [64, 128], 3
    bench = Bench(options)
    run_parts(bench, options.parts)
    print_line({"benchmark": "steps", **surroundings(), "readings": bench.readings})


if __name__ == "__main__":
    main()
