"""A whole job at the size of Qwen3-4B on one GPU: mlx-lm's BatchGenerator, our two ways, the floor.

    python -m benchmarks.scale [--slots 64 32 128] [--batch-sizes 64 32 128 256]
                               [--profiles math code chat] [--answer-tokens LOW [HIGH]]
                               [--contestants mlx_lm_batch baseline speculation]
                               [--items-per-slot 3] [--draft-length 7] [--budget-s 360] [--toy]

Weights are random (`benchmarks.random_pair`), costs are real, acceptance is simulated: the drafter
runs in full and its drafts are then replaced by the target's own continuation, spoiled as often as
the paper's drafter is rejected (`benchmarks.rehearsal`). Every contestant answers `items-per-slot`
random prompts per slot (64 to 192 tokens) with the same numbers of tokens, drawn evenly between LOW
and HIGH, in one process with one model; tokens per second are those of the whole job, prefill
included, after a warm-up of one and a half items per slot, with answers of all lengths;
`busy_share` is the share of the job in which the GPU ran some kernel, as its driver counts it, and
`idle_share` what is missing to the share that the driver counts while the GPU never waits. All must
say the tokens that this target is known to say; `wrong` counts the answers that differ.

The floor of a round: each matrix and each cached position read once, at the device's bandwidth, or
the operations at its matrix rate, whichever takes longer; for verifying, drafting, and extending
the drafter's context one after the other.

Every reading goes to stderr at once; one JSON line at the end. Sizes run in the order given, and
what has not begun when the budget is spent is left out.
"""

import argparse
import gc
import json
import sys
import time
from functools import partial
from random import Random

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator

from benchmarks.common import busy_share, print_line, surroundings
from benchmarks.random_pair import SIZES, num_parameters, random_pair
from benchmarks.rates import busy_share_of_a_full_device, measured_rates, nominal_rates
from benchmarks.rehearsal import PROFILES, accept_length, rehearse
from dspark_batch.engine.engine import Engine
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.types import Item, Request

CONTESTANTS = ["mlx_lm_batch", "baseline", "speculation"]
PROMPT_TOKENS = (64, 192)


class Scale:
    """The pair, the options, and where readings go."""

    def __init__(self, options):
        self.options = options
        self.name = "toy" if options.toy else "4b"
        self.size = SIZES[self.name]
        self.prompt_tokens = (8, 24) if options.toy else PROMPT_TOKENS
        dtype = mx.float32 if options.toy else mx.bfloat16
        self.pair, follower = random_pair(self.name, dtype)
        self.passes = {k: _passes(self, k) for k in (0, options.draft_length)}
        self.follower = follower
        self.follows = np.array(follower).tolist()
        self.readings = []
        self.began = time.perf_counter()

    def work(self, items, answer_tokens, seed):
        """Draw items; those of a smaller job begin a larger one."""
        rng = Random(seed)
        return [
            Request(
                Item(index, str(index), f"{index:032x}", f"benchmark:{index}"),
                tuple(
                    rng.randrange(self.size.vocabulary)
                    for _ in range(rng.randint(*self.prompt_tokens))
                ),
                rng.randint(*answer_tokens),
            )
            for index in range(items)
        ]

    def num_wrong(self, work, answers):
        """Count the answers that are not what this target says."""
        return sum(
            list(ids) != self._known(request) for request, ids in zip(work, answers, strict=True)
        )

    def _known(self, request):
        token, known = request.prompt_ids[-1], []
        for _ in range(request.max_tokens):
            token = self.follows[token]
            known.append(token)
        return known

    def measure(self, contestant, slots, make_run, **labels):
        """Warm up, run the job, keep and show the reading."""
        where = {"contestant": contestant, "slots": slots, **labels}
        if time.perf_counter() - self.began > self.options.budget_s:
            reading = where | {"left_out": f"the budget of {self.options.budget_s} s is spent"}
        else:
            try:
                reading = where | self._timed(slots, make_run())
            except (RuntimeError, ValueError) as error:
                reading = where | {"failed": f"{type(error).__name__}: {error}"}
        self.readings.append(reading)
        print(json.dumps(reading), file=sys.stderr, flush=True)
        gc.collect()  # the next contestant begins with the memory that this one had
        mx.clear_cache()

    def _timed(self, slots, run):
        began = time.perf_counter()
        # They end one after the other, so passes over fewer slots are compiled here, too.
        run(self.work(slots + slots // 2, (1, self.options.answer_tokens[1]), seed=19))
        warm_up_s = time.perf_counter() - began
        work = self.work(slots * self.options.items_per_slot, self.options.answer_tokens, seed=20)
        mx.synchronize()
        mx.reset_peak_memory()
        with busy_share() as share:
            began = time.perf_counter()
            answers, told = run(work)
            seconds = time.perf_counter() - began
            told["busy_share"] = share()
        tokens = sum(map(len, answers))
        return {
            "items": len(work),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "wrong": self.num_wrong(work, answers),
            "warm_up_s": round(warm_up_s, 2),
            "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
            **told,
        }

    def reading(self, contestant, slots, profile=None):
        """Look up tokens per second; None if it was not measured."""
        for each in self.readings:
            if (each["contestant"], each["slots"], each.get("profile")) == (
                contestant,
                slots,
                profile,
            ):
                return each.get("tokens_per_s")
        return None

    def best(self, contestant, profile=None):
        """Look up tokens per second at the size where they are most; None if not measured."""
        found = [
            each.get("tokens_per_s", 0)
            for each in self.readings
            if (each["contestant"], each.get("profile")) == (contestant, profile)
        ]
        return max(found, default=None) or None


def mlx_lm_batch(scale, batch_size):
    """Make a run of mlx-lm's BatchGenerator; it prefills a quarter of its size at once, as its own
    defaults do.
    """

    def run(work):
        generator = BatchGenerator(
            scale.pair.target.model,
            completion_batch_size=batch_size,
            prefill_batch_size=max(1, batch_size // 4),
        )
        uids = generator.insert(
            [list(r.prompt_ids) for r in work], max_tokens=[r.max_tokens for r in work]
        )
        answers = {uid: [] for uid in uids}
        with as_they_come(), generator.stats() as stats:
            while responses := generator.next_generated():
                for response in responses:
                    answers[response.uid].append(int(response.token))
        generator.close()
        told = {
            "steps": stats.generation_steps,
            "step_ms": round(1e3 * stats.decode_time / max(1, stats.generation_steps), 3),
        }
        return [answers[uid] for uid in uids], told

    return run


def our_engine(scale, slots, draft_length):
    """Make the engine; the only place that does."""
    return Engine(scale.pair, slots=slots, draft_length=draft_length)


def ours(scale, slots, draft_length):
    """Make a run of the engine; warm-up and job share it."""
    engine = our_engine(scale, slots, draft_length)
    gauge, all_lengths, all_rounds = engine.gauge(), 0, 0

    def run(work):
        nonlocal gauge, all_lengths, all_rounds
        answers = sorted(engine.generate(work), key=lambda outcome: outcome.item.index)
        lengths = [length for answer in answers for length in answer.accept_lengths]
        past, gauge = gauge, engine.gauge()
        all_lengths += len(lengths)
        rounds = round(all_lengths / gauge.busy_slots) - all_rounds  # the gauge tells of both runs
        all_rounds += rounds
        told = {
            "rounds": rounds,
            "round_ms": round(1e3 * (gauge.round_s - past.round_s) / rounds, 3),
            "prefill_s": round(gauge.prefill_s - past.prefill_s, 3),
            "busy_slots": round(len(lengths) / rounds, 2),
            "accept_length": round(sum(lengths) / len(lengths), 3),
            "idle_s": round(gauge.idle_s - past.idle_s, 3),
        }
        return [answer.token_ids for answer in answers], told

    return run


# The floor


def floor_seconds(scale, slots, draft_length, rates):
    """Give the time below which no round of so many slots can be, in seconds."""
    rate, bandwidth = rates
    costs = scale.passes[draft_length]
    return sum(
        max((fixed + slots * by_slot) / bandwidth, slots * work / rate)
        for fixed, by_slot, work in costs
    )


def _passes(scale, draft_length):
    """List the costs of verifying, and with drafts of drafting and extending: bytes, bytes for each
    slot, operations for each slot.
    """
    size, pair, width = scale.size, scale.pair, 1 + draft_length
    itemsize = pair.target.model.lm_head.weight.itemsize

    def matrices(numbers, tokens):
        return numbers * itemsize, 0, 2 * numbers * tokens

    def attention(layers, tokens):
        context = (sum(scale.prompt_tokens) + sum(scale.options.answer_tokens) / 2) / 2
        cached = 2 * layers * context * size.kv_heads * size.head_dim
        work = 4 * layers * tokens * context * size.heads * size.head_dim
        return 0, cached * itemsize, work

    verifying = [
        matrices(num_parameters(pair.target.model, "embed_tokens"), width),
        attention(size.layers, width),
    ]
    if draft_length == 0:
        return [_sum(verifying)]
    layers = num_parameters(pair.drafter, "markov", "fc", "confidence")
    drafting = [
        matrices(layers + size.vocabulary * size.hidden, draft_length),
        attention(size.draft_layers, draft_length),
        matrices(num_parameters(pair.drafter.markov_head.markov_w2), draft_length),
    ]
    kv = [m for each in pair.drafter.layers for m in (each.self_attn.k_proj, each.self_attn.v_proj)]
    extending = matrices(sum(map(num_parameters, [pair.drafter.fc, *kv])), width)
    return [_sum(verifying), _sum(drafting), extending]


def _sum(costs):
    return [sum(column) for column in zip(*costs, strict=True)]


def add_floors(scale, rates):
    """Say of each reading what share of the floor's speed its rounds, or steps, reach."""
    for reading in scale.readings:
        reached_ms = reading.get("round_ms") or reading.get("step_ms")
        for name, found in rates.items():
            if reached_ms and found:
                shape = (reading["slots"], reading.get("draft_length", 0))
                floor_ms = 1e3 * floor_seconds(scale, *shape, found)
                reading[f"floor_ms_{name}"] = round(floor_ms, 3)
                reading[f"share_of_floor_{name}"] = round(floor_ms / reached_ms, 3)


def add_idle(scale, full):
    """Say of each reading how long the GPU waited; `full` is what is counted if it does not."""
    for reading in scale.readings:
        if full and reading.get("busy_share") is not None:
            reading["idle_share"] = round(max(0.0, 1 - reading["busy_share"] / full), 3)


# What must hold


def claims(scale):
    """List what must hold with what was reached; None where something was not measured."""
    return [
        *[
            _claim(f"{profile}, {slots} slots, over BatchGenerator at the same", needed, ratio)
            for profile, needed in (("math", 4.0), ("chat", 2.5))
            for slots in (32, 64)
            for ratio in [_ratio(scale, slots, profile)]
        ],
        _claim(
            "math, each at its own best size",
            2.5,
            _over(scale.best("speculation", "math"), scale.best("mlx_lm_batch")),
        ),
        _claim(
            "baseline over BatchGenerator, 64 slots",
            1.3,
            _over(scale.reading("baseline", 64), scale.reading("mlx_lm_batch", 64)),
        ),
        _claim("share of the floor's speed, 512 tokens a round", 0.4, _share(scale)),
    ]


def _claim(name, needed, reached):
    holds = None if reached is None else reached >= needed
    return {"claim": name, "at_least": needed, "reached": reached, "holds": holds}


def _ratio(scale, slots, profile):
    return _over(scale.reading("speculation", slots, profile), scale.reading("mlx_lm_batch", slots))


def _over(ours_per_s, theirs_per_s):
    return round(ours_per_s / theirs_per_s, 3) if ours_per_s and theirs_per_s else None


def _share(scale):
    shares = [
        each["share_of_floor_measured"]
        for each in scale.readings
        if "round_ms" in each and each["slots"] * (1 + each["draft_length"]) == 512
    ]
    return max(shares, default=None)


def run_all(scale):
    """Run every contestant that the options name, size by size."""
    options = scale.options
    for size in options.batch_sizes if "mlx_lm_batch" in options.contestants else ():
        scale.measure("mlx_lm_batch", size, partial(mlx_lm_batch, scale, size))
    for size in options.slots:
        if "baseline" in options.contestants:
            scale.measure("baseline", size, partial(ours, scale, size, 0), draft_length=0)
        for name in options.profiles if "speculation" in options.contestants else ():
            _measure_speculation(scale, size, name)


def _measure_speculation(scale, slots, name):
    draft_length, profile = scale.options.draft_length, PROFILES[name]
    rehearse(scale.pair.drafter, scale.follower, profile)
    labels = {
        "profile": name,
        "draft_length": draft_length,
        "simulated_accept_length": round(accept_length(profile[:draft_length]), 3),
    }
    scale.measure("speculation", slots, partial(ours, scale, slots, draft_length), **labels)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="*", default=[64, 32, 128])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[64, 32, 128, 256])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--profiles", nargs="*", choices=PROFILES, default=[*PROFILES])
    parser.add_argument("--answer-tokens", type=int, nargs="+", default=[192])
    parser.add_argument("--items-per-slot", type=int, default=3)
    parser.add_argument("--draft-length", type=int, default=7)
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--toy", action="store_true", help="a tiny pair, to try this on a CPU")
    if parser.parse_args().toy:
        parser.set_defaults(slots=[2, 4], batch_sizes=[2, 4], answer_tokens=[40])
    options = parser.parse_args()
    options.answer_tokens = (options.answer_tokens[0], options.answer_tokens[-1])
    scale = Scale(options)
    rates = {"measured": measured_rates(options.toy), "nominal": nominal_rates()}
    run_all(scale)
    add_floors(scale, rates)
    full = busy_share_of_a_full_device(options.toy)
    add_idle(scale, full)
    print_line(
        {
            "benchmark": "scale",
            **surroundings(),
            "sizes": scale.name,
            "weights": "random",
            "acceptance": "simulated, from conditional acceptance by block position",
            "profiles": {name: PROFILES[name] for name in options.profiles},
            "prompt_tokens": scale.prompt_tokens,
            "answer_tokens": options.answer_tokens,
            "items_per_slot": options.items_per_slot,
            "busy_share_of_a_full_device": full,
            "rates": {
                name: found and {"matmul_tflops": found[0] / 1e12, "gb_per_s": found[1] / 1e9}
                for name, found in rates.items()
            },
            "readings": scale.readings,
            "claims": claims(scale),
        }
    )


if __name__ == "__main__":
    main()
