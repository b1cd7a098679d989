"""Looked-up drafts: beside the drafter against the drafter alone, and alone against no drafts.

    python -m benchmarks.lookup [--items 200] [--slots 1 4 16]

Two jobs: `sample_inputs/copies.jsonl`, whose answers copy their prompts, and held-out items, which
hardly do. The contestants decode by turns of a tenth of a second in one process. `beside` is the
rate of drafter and look-ups over that of the drafter, `alone` that of look-ups over plain decoding.
"""

import argparse
import json
import sys

import dspark_batch  # noqa: F401  the BLAS, before MLX
from benchmarks.common import ROOT, held_out_records, print_line, requests, surroundings
from benchmarks.never_slower import Contestant
from dspark_batch.answers.who_drafts import with_look_ups
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.pair import load_pair

MAX_TOKENS = 128
COPIES = ROOT / "sample_inputs" / "copies.jsonl"


def jobs(limit):
    """List the prompts of each job."""
    copies = [json.loads(line)["prompt"] for line in COPIES.read_text().splitlines()]
    return {
        "copies": copies[:limit],
        "held_out": [record["prompt"] for record in held_out_records(limit)],
    }


def settings_of(pair, slots, **more):
    setup = set_up(pair)
    known = {"shapes": setup.shapes, "lengths": setup.lengths, "costs": setup.costs}
    return {"slots": slots, **known, **more}


def compare(pair, work, slots):
    """Let all decode by turns; all must say the same."""
    alone = with_look_ups(pair._replace(drafter=NoDrafter()))
    entered = {
        "plain": (pair, {"slots": slots, "draft_length": 0}),
        "look_ups": (alone, settings_of(alone, slots, lookup=True)),
        "drafter": (pair, settings_of(pair, slots)),
        "both": (pair, settings_of(pair, slots, lookup=True)),
    }
    for used, settings in entered.values():  # warm up
        list(Engine(used, **settings).generate(work[: 2 * slots]))
    everyone = {n: Contestant(used, work, **settings) for n, (used, settings) in entered.items()}
    while not all(each.is_done for each in everyone.values()):
        for contestant in everyone.values():
            if not contestant.is_done:
                contestant.turn()
    rate = {name: each.rate for name, each in everyone.items()}
    answers = everyone["plain"].answers
    return {
        "tokens_per_s": {name: round(each, 1) for name, each in rate.items()},
        "accept_length": {name: each.accept_length for name, each in everyone.items()},
        "beside": round(rate["both"] / rate["drafter"], 3),
        "alone": round(rate["look_ups"] / rate["plain"], 3),
        "identical": all(each.answers == answers for each in everyone.values()),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    pair, results = load_pair("tiny"), []
    for job, prompts in jobs(options.items).items():
        work = requests(pair, prompts, MAX_TOKENS)
        for slots in options.slots:
            results.append({"job": job, "slots": slots, **compare(pair, work, slots)})
            print(results[-1], file=sys.stderr, flush=True)
    print_line({"benchmark": "lookup", **surroundings(), "results": results})


if __name__ == "__main__":
    main()
