"""Verify lengths by confidence, Algorithm 1, against one draft length for all slots.

    python -m benchmarks.verify_lengths [--machine benchmarks/results/machine_4b_h100.json]

Arithmetic over the measured passes of a machine, of this one without --machine: confidences are
drawn and taken to be true, and reading them is free, so it says what could be gained at most. The
drafter takes a quarter of the target's pass. `by_position` and `paper` are tokens per second over
those of the best single draft length, at least 1; by slots. Prints one JSON line.
"""

import argparse
import json
from itertools import accumulate
from operator import mul
from pathlib import Path
from random import Random

from benchmarks.common import print_line, surroundings
from dspark_batch.engine.machine import Machine
from dspark_batch.engine.scheduler import DrafterPass, StepCurve, accept_length, verify_lengths
from dspark_batch.engine.setup import set_up
from dspark_batch.models.load import load_pair

BLOCK = 7
DRAFTER_SHARE = 0.25
SLOTS = (1, 4, 8, 16, 32, 64)
# The chance of each draft of a block, if those before it are accepted.
BLOCKS = {
    "all alike": lambda random: [0.8] * BLOCK,
    "easy and hard blocks": lambda random: [random.choice([0.95, 0.5])] * BLOCK,
    "easy and hard drafts": lambda random: random.choices([0.99, 0.1], [6, 1], k=BLOCK),
}


def rate(curve, rounds, lengths):
    """Expect the tokens per second of rounds that verify so many drafts of each slot."""
    tokens = seconds = 0.0
    for survivals, verify_len in zip(rounds, lengths, strict=True):
        tokens += sum(accept_length(s, 1 + n) for s, n in zip(survivals, verify_len, strict=True))
        slots, width = len(survivals), 1 + max(verify_len)
        seconds += curve.draft_s(slots) + curve.verify_s(slots, width)
    return tokens / seconds


def gains(curve, slots, draw):
    """Compare both ways to choose lengths with the best single one."""
    random, num_rounds = Random(1), max(60, 600 // slots)
    drawn = ([draw(random) for _ in range(slots)] for _ in range(num_rounds))
    rounds = [[list(accumulate(block, mul)) for block in blocks] for blocks in drawn]

    def seconds(num_tokens, width):
        return curve.draft_s(slots) + curve.verify_s(slots, width)

    def chosen(**how):
        return rate(curve, rounds, [verify_lengths(each, seconds, **how) for each in rounds])

    fixed = max(rate(curve, rounds, [[k] * slots] * num_rounds) for k in range(1, BLOCK + 1))
    return {
        "by_position": round(chosen(stop_early=False, by_position=True) / fixed, 3),
        "paper": round(chosen(stop_early=True) / fixed, 3),
    }


def machine_curve(machine, *, exact):
    """Give a machine's curve, with a typical drafter."""
    passes = machine.curve([], exact=exact).target
    blocks = {p.slots: DRAFTER_SHARE * p.seconds for p in passes if p.width == 1 + BLOCK}
    return StepCurve(passes, tuple(DrafterPass(*each) for each in sorted(blocks.items())))


def measure(options):
    """Go through the class and all measured passes, by slots and kinds of blocks."""
    if options.machine:
        machine = Machine.from_json(json.loads(options.machine.read_text()))
    else:
        machine = set_up(load_pair()).machine
    result = {}
    for name, exact in (("class", True), ("any shape", False)):
        curve = machine_curve(machine, exact=exact)
        for slots in (n for n in SLOTS if curve.covers(n, BLOCK)):
            kinds = {kind: gains(curve, slots, draw) for kind, draw in BLOCKS.items()}
            result[f"{name}, {slots} slots"] = kinds
    return result


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", type=Path)
    options = parser.parse_args()
    where = {"machine": options.machine.name} if options.machine else surroundings()
    print_line({"benchmark": "verify_lengths", **where, "gains": measure(options)})


if __name__ == "__main__":
    main()
