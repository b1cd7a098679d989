"""The automatic plan against static ones: how many slots, and how many drafts.

    python -m benchmarks.plans [--items 28 200] [--slots 8 16 32 64] [--draft-lengths 0 3 7]

The bundled pair answers held-out items. The automatic plan is that of `run`, which knows how many
items come, and learns while it works how many drafts pay. Without DSPARK_BATCH_CACHE at an empty
folder, costs may be known from earlier jobs. The contestants decode by turns of a tenth of a
second in one process (`turns.py`); static plans that are far behind leave early. `ratio` is the
automatic plan's tokens per second over those of the best static one. One JSON line.
"""

import argparse
import sys

import dspark_batch  # noqa: F401  the BLAS, before MLX
from benchmarks.common import held_out_records, print_line, requests, surroundings
from benchmarks.turns import Contestant, compete
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.pair import load_pair

MAX_TOKENS = 128


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, nargs="+", default=[28, 200])
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 3, 7])
    options = parser.parse_args()
    pair = load_pair("tiny")
    results = []
    for items in options.items:
        prompts = [record["prompt"] for record in held_out_records(items)]
        work = requests(pair, prompts, MAX_TOKENS)
        setup = set_up(pair, num_items=items, max_tokens=MAX_TOKENS)
        plan = {"slots": setup.plan.slots, "lengths": setup.lengths, "costs": setup.costs}
        list(Engine(pair, **plan).generate(work))  # warm up
        fixed = {
            f"{slots} x {k}": Contestant(pair, work, slots=slots, draft_length=k)
            for slots in options.slots
            for k in options.draft_lengths
        }
        found = compete(fixed, Contestant(pair, work, **plan), work)
        results.append({"items": items, "slots": setup.plan.slots, **found})
        print(results[-1], file=sys.stderr, flush=True)
    print_line({"benchmark": "plans", **surroundings(), "results": results})


if __name__ == "__main__":
    main()
