"""What equal bits cost on a GPU, and that they are equal: safe rows beside rows as they come.

    python -m benchmarks.safe_rows [--shapes 64x0 8x0 64x7] [--rounds 192]
                                   [--bits 8] [--grid] [--no-speed] [--toy]

A pair with random weights (`benchmarks.random_pair`; with `--bits` its target is quantised) decodes
one item a slot in two ways: its products over safe rows, and over as many rows as there are, which
is what mlx-lm's code does. Each way has a pair and an engine of its own. They take turns of 8
rounds, so what else the machine does hits both; all items run once before, so all is compiled.
Shapes are slots x drafts. `ratio` is that of the speeds, safe rows over rows as they come;
`median_ratio` the median over the turns. With drafts the acceptance is simulated (math,
`benchmarks.rehearsal`), and there are a quarter as many rounds.

`--grid`: three contents run in steps of 1 to 64 slots by 1 to 16 tokens. Logits, keys and values
must have the bits that a content has alone; `differ` lists the steps whose bits are others.

One JSON line; exit 1 if bits differ.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from random import Random
from statistics import median

import mlx.core as mx
import mlx.nn as nn

from benchmarks.common import print_line, surroundings
from benchmarks.random_pair import SIZES, random_pair
from benchmarks.rehearsal import PROFILES, rehearse
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.passes import Passes
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.numerics.rows import VERDICTS, as_they_come
from dspark_batch.types import Item, Request

WAYS = {"safe": nullcontext, "as_they_come": as_they_come}
PROMPTS = (1, 9, 70)  # tokens of the contents
SETTLING, TURN = 32, 8  # rounds
STEPS = 16  # tokens behind each of them
GRID_SLOTS, GRID_WIDTHS = (1, 2, 3, 8, 16, 33, 64), (1, 2, 3, 4, 8, 16)


def work(slots, vocabulary, answer_tokens):
    """Draw an item for each slot."""
    rng = Random(20)
    return [
        Request(
            Item(index, str(index), f"{index:032x}", f"benchmark:{index}"),
            tuple(rng.randrange(vocabulary) for _ in range(rng.randint(64, 192))),
            answer_tokens,
        )
        for index in range(slots)
    ]


def paired(name, dtype, bits):
    """Make a pair."""
    pair, follower = random_pair(name, dtype)
    if bits:
        nn.quantize(pair.target.model, 64, bits)
        mx.eval(pair.target.model.parameters())
        make_rows_safe(pair.target.model)
    rehearse(pair.drafter, follower, PROFILES["math"])
    return pair


def raced(pairs, slots, draft_length, options):
    """Decode the same items in both ways, in turns of some rounds; the first time compiles."""
    rounds = options.rounds if draft_length == 0 else options.rounds // 4
    tokens = (SETTLING + rounds) * (1 + draft_length)
    engines = {way: Engine(pairs[way], slots=slots, draft_length=draft_length) for way in WAYS}
    vocabulary = pairs["safe"].target.facts.vocab_size
    for is_measured in (False, True):
        for engine in engines.values():
            for request in work(slots, vocabulary, tokens):
                engine.add(request)
        answers, round_ms = {way: [] for way in WAYS}, {way: [] for way in WAYS}
        _step(engines, SETTLING, answers)  # prompts
        for turn in range(rounds // TURN if is_measured else 0):
            seconds = _step(engines, TURN, answers, backwards=turn % 2 == 1)
            for way in WAYS:
                round_ms[way].append(1e3 * seconds[way] / TURN)
        while not all(engine.is_idle for engine in engines.values()):
            _step(engines, TURN, answers)
    told = {
        "slots": slots,
        "drafts": draft_length,
        "round_ms": {way: round(median(round_ms[way]), 3) for way in WAYS},
        "ratio": round(sum(round_ms["as_they_come"]) / sum(round_ms["safe"]), 4),
        "ratios_of_turns": [
            round(free / safe, 3)
            for free, safe in zip(round_ms["as_they_come"], round_ms["safe"], strict=True)
        ],
        "same_answers": sorted(answers["safe"]) == sorted(answers["as_they_come"]),
    }
    told["median_ratio"] = median(told["ratios_of_turns"])
    print(json.dumps(told), file=sys.stderr, flush=True)
    return told


def _step(engines, count, answers, *, backwards=False):
    """Step each engine, one after the other; seconds by way."""
    seconds = {}
    for way in [*WAYS][:: -1 if backwards else 1]:
        mx.synchronize()
        began = time.perf_counter()
        with WAYS[way]():
            outcomes = [each for _ in range(count) for each in engines[way].step()]
        mx.synchronize()
        seconds[way] = time.perf_counter() - began
        answers[way] += [(each.item.index, each.token_ids) for each in outcomes]
    return seconds


class Grid:
    """Runs contents side by side, in steps of any shape."""

    def __init__(self, target):
        self.passes = Passes(target, NoDrafter())
        self.make_cache = target.make_cache
        self.known = [self.run([content], 8) for content in range(len(PROMPTS))]

    def run(self, contents, width):
        """Run contents in steps of a width; logits [S, STEPS, V] and what is cached of each."""
        cache = self.make_cache(len(contents), max(PROMPTS) + 2 * STEPS)
        self._step(cache, [_ids(content, 0, PROMPTS[content]) for content in contents])
        logits = []
        for start in range(0, STEPS, width):
            count = min(width, STEPS - start)
            ids = [_ids(content, PROMPTS[content] + start, count) for content in contents]
            logits.append(self._step(cache, ids, width)[:, :count])
        said = mx.concatenate(logits, axis=1)
        ends = [PROMPTS[content] + STEPS for content in contents]
        return said, [list(cache.snapshot(slot, 0, end).arrays) for slot, end in enumerate(ends)]

    def _step(self, cache, ids, width=0):
        counts = [len(each) for each in ids]
        width = max(width, max(counts))
        tokens = [[*each, *[0] * (width - len(each))] for each in ids]
        said, _ = self.passes.run(cache, mx.array(tokens))
        cache.keep(mx.array(counts))
        mx.eval(said, cache.arrays())
        return said

    def differ(self, contents, width):
        """List the contents that have other bits than alone."""
        said, cached = self.run(contents, width)
        found = set()
        for slot, content in enumerate(contents):
            logits, parts = self.known[content]
            same = [_same(said[slot], logits[0])]
            same += [_same(a, b) for a, b in zip(cached[slot], parts[0], strict=True)]
            if not mx.all(mx.stack(same)).item():
                found.add(content)
        return sorted(found)


def _same(a, b):
    return mx.all(a.view(mx.uint8) == b.view(mx.uint8))


def _ids(content, start, count):
    places = range(start, start + count)
    return [(31 * content + 7 * place + place * place) % 150 for place in places]


def searched(target):
    """Run the whole grid; say which steps had other bits."""
    grid, rng, differ = Grid(target), Random(1), []
    for slots in GRID_SLOTS:
        for width in GRID_WIDTHS:
            contents = [rng.randrange(len(PROMPTS)) for _ in range(slots)]
            if others := grid.differ(contents, width):
                differ.append({"slots": slots, "width": width, "contents": others})
        print(f"{slots} slots: {len(differ)} steps differ", file=sys.stderr, flush=True)
    return {"slots": GRID_SLOTS, "widths": GRID_WIDTHS, "differ": differ}


def verdicts():
    """List the counts that were asked about, by product."""
    told = {}
    for (product, count), is_safe in sorted(VERDICTS.items(), key=lambda each: each[0][1]):
        name = f"{product.dtype} {product.size} x {product.width} {product.quantised or ''}"
        name += " in halves" if product.matrices == 2 else ""
        told.setdefault(name.strip(), {"safe": [], "not": []})["safe" if is_safe else "not"].append(
            count
        )
    return told


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["64x0", "8x0", "64x7"])
    parser.add_argument("--rounds", type=int, default=192)
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--toy", action="store_true", help="a tiny pair, to try this on a CPU")
    options = parser.parse_args()
    name = "toy" if options.toy else "4b"
    dtype = mx.float32 if options.toy else mx.bfloat16
    pairs = {}
    for way in ["safe"] if options.no_speed else WAYS:
        with WAYS[way]():
            pairs[way] = paired(name, dtype, options.bits)
    shapes = [] if options.no_speed else [map(int, each.split("x")) for each in options.shapes]
    races = [raced(pairs, *shape, options) for shape in shapes]
    grid = searched(pairs["safe"].target) if options.grid else None
    print_line(
        {
            "benchmark": "safe_rows",
            **surroundings(),
            "sizes": SIZES[name].hidden,
            "dtype": str(dtype),
            "bits": options.bits,
            "rounds": options.rounds,
            "races": races,
            "grid": grid,
            "verdicts": verdicts(),
        }
    )
    if grid and grid["differ"]:
        raise SystemExit("bits differ")


if __name__ == "__main__":
    main()
