"""Rounds of many slots over one long prompt: kept and read once, in copies, and without it.

    python -m benchmarks.shared_prompt [--pair tiny] [--items 64] [--shared-tokens 1500]
                                       [--own-tokens 50] [--answer-tokens 64]
                                       [--draft-lengths 0 7] [--turns 3]

As many items as slots, all of them decode together. `--pair` is `tiny`, the bundled one, or a
random one of `benchmarks.random_pair`. Printed of each way are tokens per second of its rounds
(prompts take no part in it, and of random drafts few are accepted), milliseconds and processor
milliseconds of a round, all medians of the turns, and the most memory beside the weights. The
ways take turns. `identical` says whether the answers over the shared prompt are the same, kept once
and in copies. Prints one JSON line.
"""

import argparse
import time
from random import Random
from statistics import median

import mlx.core as mx

from benchmarks.common import print_line, surroundings
from benchmarks.random_pair import SIZES, random_pair
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.shapes import Shapes
from dspark_batch.pair import load_pair
from dspark_batch.types import Item, Request, Sampling


class Copies(Shapes):
    """Every slot has its own copy of a shared beginning."""

    def share(self, slots):
        """Never do so."""
        return False


def work(options, shared_tokens):
    """Draw prompts of random tokens, whose answers have a length."""
    rng = Random(11)
    shared = [rng.randrange(3, 500) for _ in range(shared_tokens)]
    for index in range(options.items):
        length = rng.randint(options.own_tokens // 2, options.own_tokens * 3 // 2)
        own = [rng.randrange(3, 500) for _ in range(1 + length)]
        item = Item(index, str(index), f"{index:032x}", f"benchmark:{index}")
        sampling = Sampling(ignore_eos=True)
        yield Request(item, (*shared, *own), options.answer_tokens, sampling)


def answered(pair, requests, shapes, draft_length):
    """Answer all together; return answers, numbers of rounds, and what they took."""
    engine = Engine(pair, slots=len(requests), draft_length=draft_length, shapes=shapes)
    mx.reset_peak_memory()
    weights = mx.get_active_memory()
    for request in requests:
        engine.add(request)
    outcomes, spent = [], []
    while not engine.is_idle:
        began = time.perf_counter(), time.process_time()
        before = engine.gauge().prompt_tokens, len(outcomes)
        outcomes += engine.step()
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        if (engine.gauge().prompt_tokens, len(outcomes)) == before and engine._slots.active:
            spent.append((len(engine._slots.active), *took))
    most = max((slots for slots, *_ in spent), default=0)
    full = [taken for taken in spent if taken[0] == most]
    outcomes.sort(key=lambda outcome: outcome.item.index)
    return {
        "answers": [outcome.token_ids for outcome in outcomes],
        "slots": most,
        "tokens": sum(len(o.token_ids) - 1 for o in outcomes) / engine._clock.slot_rounds,
        "round_ms": 1000 * median(seconds for _, seconds, _ in full),
        "processor_ms": 1000 * median(seconds for _, _, seconds in full),
        "peak_mb": (mx.get_peak_memory() - weights) / 2**20,
    }


def measure(options):
    """Run all ways in turns."""
    random = options.pair in SIZES
    pair = random_pair(options.pair)[0] if random else load_pair(dtype=options.dtype)
    over, alone = (list(work(options, count)) for count in (options.shared_tokens, 0))
    ways = {"once": (over, Shapes()), "copies": (over, Copies()), "alone": (alone, Shapes())}
    results = {}
    for draft_length in options.draft_lengths:
        turns = {way: [] for way in ways}
        for turn in range(1 + options.turns):
            for way in Random(turn).sample([*ways], len(ways)):
                turns[way].append(answered(pair, *ways[way], draft_length))
        results[f"drafts_{draft_length}"] = {
            "identical": turns["once"][0]["answers"] == turns["copies"][0]["answers"],
            **{way: summary(found[1:] or found) for way, found in turns.items()},
        }
    return {**surroundings(), **vars(options), "dtype": pair.config.dtype, **results}


def summary(found):
    """Take medians of some turns."""
    middle = {
        name: round(median(each[name] for each in found), 3)
        for name in ("slots", "tokens", "round_ms", "processor_ms", "peak_mb")
    }
    rate = 1000 * middle["slots"] * middle["tokens"] / middle["round_ms"]
    return {"tokens_per_s": round(rate, 1), **middle}


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="tiny")
    parser.add_argument("--dtype")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--shared-tokens", type=int, default=1500)
    parser.add_argument("--own-tokens", type=int, default=50)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 7])
    parser.add_argument("--turns", type=int, default=3)
    print_line({"benchmark": "shared_prompt", **measure(parser.parse_args())})


if __name__ == "__main__":
    main()
