"""Drafts of any worth: the automatic draft length against each fixed one, none included.

    python -m benchmarks.never_slower [--items 100] [--slots 1 4 16] [--tokens 1.3 2 3 5 7]
                                      [--draft-lengths 0 1 2 3 4 5 6 7] [--repeats 1]

The bundled pair answers held-out items. Its drafts, nearly always right, are spoiled at random so
that a round of seven gives about as many tokens as told. The contestants decode by turns of a tenth
of a second in one process (`turns.py`), each job `repeats` times from the start, of which the
medians count; fixed draft lengths that are far behind leave early.
`ratio` is the automatic draft length's tokens per second over those of the best fixed one: 1 is as
good, less is slower. Verdicts are known, as behind a machine's first job, which tests them for half
a second. Without DSPARK_BATCH_CACHE at an empty folder, costs may be known from earlier jobs, too.

    python -m benchmarks.never_slower --pair TARGET DRAFTER --prompts IN.jsonl [--max-tokens 64]

Another pair answers the prompts of a file, with its drafts as they are.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import dspark_batch  # noqa: F401  the BLAS, before MLX

import mlx.core as mx  # isort: skip

from benchmarks.common import held_out_records, print_line, requests, surroundings
from benchmarks.turns import Contestant, compete_often
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.numerics.chance import Chance
from dspark_batch.pair import load_pair

MAX_TOKENS, WARM_UP_TOKENS = 64, 16


class Spoiled(DSparkDrafter):
    """Drafts as the real one does, then exchanges some tokens for others."""

    def propose(self, anchor, context, num_drafts, choose):
        """Draft from the anchor; see `DSparkDrafter.propose`."""
        draft = super().propose(anchor, context, num_drafts, choose)
        if draft.tokens.shape[1] == 0:
            return draft
        keys = mx.stack([anchor, mx.zeros_like(anchor)], axis=1).astype(mx.uint32)
        uniforms = Chance(keys, context.lengths).accept_uniforms(num_drafts)
        other = (draft.tokens + 1) % self.config.vocab_size
        return draft._replace(tokens=mx.where(uniforms < self._kept, draft.tokens, other))


def chance_for(tokens, block=7):
    """Find the chance of each draft with which a round gives so many tokens."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        given = sum(middle**k for k in range(block + 1))
        low, high = (middle, high) if given < tokens else (low, middle)
    return low


def asked(options):
    """Load the pair; give how many tokens a round should give, None as it does, and the prompts."""
    if options.pair:
        target, drafter = options.pair
        pair, levels = load_pair(target=target, drafter=drafter), [None]
        records = map(json.loads, options.prompts.read_text().splitlines()[: options.items])
    else:
        pair, levels, records = load_pair("tiny"), options.tokens, held_out_records(options.items)
        pair.drafter.__class__ = Spoiled
    return pair, levels, [record["prompt"] for record in records]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=float, nargs="+", default=[1.3, 2, 3, 5, 7])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--pair", nargs=2, metavar=("TARGET", "DRAFTER"))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    pair, levels, prompts = asked(options)
    work = requests(pair, prompts, options.max_tokens)
    results = []
    for slots in options.slots:
        setup = set_up(pair, slots=slots, num_items=len(work), max_tokens=options.max_tokens)
        where = {"shapes": setup.shapes, "most_positions": setup.most_positions, "slots": slots}
        for tokens in levels:
            if tokens is not None:
                pair.drafter._kept = chance_for(tokens)
            for k in range(pair.drafter.block_size + 1):  # verdicts are known then
                warm_up = requests(pair, prompts[:slots], min(WARM_UP_TOKENS, options.max_tokens))
                list(Engine(pair, **where, draft_length=k).generate(warm_up))
            make = partial(Contestant, pair, work, **where)
            found = compete_often(
                lambda make=make: {str(k): make(draft_length=k) for k in options.draft_lengths},
                partial(make, lengths=setup.lengths, costs=setup.costs),
                work,
                options.repeats,
            )
            results.append({"slots": slots, "tokens": tokens, **found})
            print(results[-1], file=sys.stderr, flush=True)
    print_line({"benchmark": "never_slower", **surroundings(), "results": results})


if __name__ == "__main__":
    main()
