"""What the prefix cache saves: items over one system prompt, with the cache and without it.

    python -m benchmarks.prefix [--items 64] [--system-tokens 403] [--own-tokens 150] [--repeats 3]

The least possible work is to compute the system prompt once and every other prompt token once.
`computed` counts prompt positions that went through the target. Prints one JSON line.
"""

import argparse
import time
from random import Random

from benchmarks.common import print_line, spread, surroundings
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.pair import load_pair
from dspark_batch.types import Item, Request


def work(options):
    """Draw prompts of random tokens that begin with the same ones; one answer token each."""
    rng = Random(11)
    system = [rng.randrange(3, 1500) for _ in range(options.system_tokens)]
    for index in range(options.items):
        length = rng.randint(options.own_tokens // 2, options.own_tokens * 3 // 2)
        own = [rng.randrange(3, 1500) for _ in range(length)]
        item = Item(index, str(index), f"{index:032x}", f"benchmark:{index}")
        yield Request(item, (*system, *own), 1)


def measure(options):
    """Run the items both ways in turns."""
    pair = load_pair(dtype=options.dtype)
    setup = set_up(pair, max_tokens=1)
    requests = list(work(options))
    own = sum(len(r.prompt_ids) - options.system_tokens for r in requests)
    ways = {"cached": setup.prefix_positions, "not_cached": 0}
    computed, seconds, answers = {}, {way: [] for way in ways}, {}
    for _ in range(1 + options.repeats):
        for way, positions in ways.items():
            settings = {"slots": setup.plan.slots, "draft_length": 0, "shapes": setup.shapes}
            engine = Engine(pair, **settings, prefix_positions=positions)
            began = time.perf_counter()
            outcomes = sorted(engine.generate(requests), key=lambda c: c.item.index)
            seconds[way].append(time.perf_counter() - began)
            computed[way] = engine.gauge().prompt_tokens
            answers[way] = [outcome.token_ids for outcome in outcomes]
    least = options.system_tokens + own
    return {
        **surroundings(),
        "dtype": pair.config.dtype,
        "items": options.items,
        "system_tokens": options.system_tokens,
        "own_tokens": own,
        "least": least,
        "computed": computed,
        "over_least": round(computed["cached"] / least - 1, 4),
        "seconds": {way: spread(taken[1:]) for way, taken in seconds.items()},
        "identical": answers["cached"] == answers["not_cached"],
    }


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--system-tokens", type=int, default=403)
    parser.add_argument("--own-tokens", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype")
    print_line({"benchmark": "prefix", **measure(parser.parse_args())})


if __name__ == "__main__":
    main()
