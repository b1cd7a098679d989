"""The automatic plan against static ones: how many slots, and how many drafts.

    python -m benchmarks.plans [--items 28 200] [--slots 8 16 32 64] [--draft-lengths 0 3 7]
                               [--turns 7]

The bundled pair answers held-out items. The automatic plan is that of `run`, which knows how many
items come, and learns while it works how many drafts pay. Without DSPARK_BATCH_CACHE at an empty
folder, costs may be known from earlier jobs. Each turn, every contestant does the whole job, one
after the other in one process, each turn beginning with another one. Static plans that are far
behind in the first turn leave. Medians of tokens per second count: `ratio` is the automatic plan's
over that of the best static one, and `ratios` are those of single turns. One JSON line.

By turns of a tenth of a second, as in `never_slower`, all jobs are in memory at once. That makes
jobs of 64 slots slower than they are alone.
"""

import argparse
import sys
import time
from statistics import median

import dspark_batch  # noqa: F401  the BLAS, before MLX

import mlx.core as mx  # isort: skip

from benchmarks.common import held_out_records, print_line, requests, surroundings
from benchmarks.turns import BEHIND
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.pair import load_pair

MAX_TOKENS = 128


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, nargs="+", default=[28, 200])
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 3, 7])
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    pair = load_pair("tiny")
    results = []
    for items in options.items:
        prompts = [record["prompt"] for record in held_out_records(items)]
        work = requests(pair, prompts, MAX_TOKENS)
        setup = set_up(pair, num_items=items, max_tokens=MAX_TOKENS)
        plans = {
            f"{slots} x {k}": {"slots": slots, "draft_length": k}
            for slots in options.slots
            for k in options.draft_lengths
        }
        auto = {"slots": setup.plan.slots, "lengths": setup.lengths, "costs": setup.costs}
        found = whole_jobs(pair, work, plans | {"auto": auto}, options.turns)
        results.append({"items": items, "slots": setup.plan.slots, **found})
        print(results[-1], file=sys.stderr, flush=True)
    print_line({"benchmark": "plans", **surroundings(), "results": results})


def whole_jobs(pair, work, plans, turns):
    """Let each plan do the whole job, some times, and compare what they took and said.

    Args:
        pair: that all of them decode with.
        work: the requests.
        plans: settings of an engine by name; "auto" is compared with the others.
        turns: how often, behind one that warms up; at least one.
    """
    said, rates, left = set(), {name: [] for name in plans}, {}
    for turn in range(-1, turns):  # the first one warms up
        names = [name for name in plans if name not in left]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rate, answers = job(pair, work, plans[name])
            said.add(answers)
            if turn >= 0:
                rates[name].append(rate)
        if turn == 0:
            best = max(rates[name][0] for name in names if name != "auto")
            behind = [name for name in names if rates[name][0] < BEHIND * best]
            left = {name: rates[name][0] for name in behind if name != "auto"}
    stayed = {name: median(rates[name]) for name in plans if name not in left}
    best = max((name for name in stayed if name != "auto"), key=stayed.__getitem__)
    pairs = zip(rates["auto"], rates[best], strict=True)
    return {
        "tokens_per_s": {name: round(rate, 1) for name, rate in (left | stayed).items()},
        "left_early": sorted(left),
        "best_fixed": best,
        "ratio": round(stayed["auto"] / stayed[best], 3),
        "ratios": [round(one / other, 3) for one, other in pairs],
        "identical": len(said) == 1,
    }


def job(pair, work, settings):
    """Do a job; return its tokens per second, and all answers in order."""
    began = time.perf_counter()
    done = list(Engine(pair, **settings).generate(work))
    mx.synchronize()
    seconds = time.perf_counter() - began
    answers = tuple(tuple(each.token_ids) for each in sorted(done, key=lambda one: one.item.index))
    return sum(map(len, answers)) / seconds, answers


if __name__ == "__main__":
    main()
