"""Drafts of any worth: the automatic draft length against each fixed one, none included.

    python -m benchmarks.never_slower [--items 100] [--slots 1 4 16] [--tokens 1.3 2 3 5 7]
                                      [--draft-lengths 0 1 2 3 4 5 6 7] [--repeats 1]

The bundled pair answers held-out items. Its drafts, nearly always right, are spoiled at random so
that a round of seven gives about as many tokens as told. Contestants take turns in one process;
seconds are medians over the turns. One JSON line for each number of slots and tokens. `ratio` is
the best fixed draft length's seconds over the automatic one's: 1 is as good, less is slower.
"""

import argparse
import sys
import time
from statistics import median

import dspark_batch  # noqa: F401  the BLAS, before MLX

import mlx.core as mx  # isort: skip

from benchmarks.common import held_out_records, print_line, requests, surroundings
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.numerics.chance import Chance
from dspark_batch.pair import load_pair

MAX_TOKENS = 64


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


def timed(pair, work, **settings):
    engine = Engine(pair, **settings)
    began = time.perf_counter()
    answers = list(engine.generate(work))
    seconds = time.perf_counter() - began
    lengths = [length for answer in answers for length in answer.accept_lengths]
    by_item = {answer.item.index: answer.token_ids for answer in answers}
    return seconds, sum(lengths) / max(1, len(lengths)), by_item


def compare(pair, setup, work, slots, draft_lengths, repeats):
    """Time every contestant; all must say the same."""
    contestants = {str(k): {"draft_length": k} for k in draft_lengths}
    contestants["auto"] = {"lengths": setup.lengths, "costs": setup.costs}
    seconds, lengths, said = {}, {}, set()
    for _ in range(repeats):
        for name, settings in contestants.items():
            took, length, answers = timed(pair, work, slots=slots, **settings)
            seconds.setdefault(name, []).append(took)
            lengths[name] = round(length, 2)
            said.add(tuple(sorted(answers.items())))
    medians = {name: round(median(each), 3) for name, each in seconds.items()}
    fixed = {name: each for name, each in medians.items() if name != "auto"}
    best = min(fixed, key=fixed.get)
    return {
        "seconds": medians,
        "accept_length": lengths,
        "best_fixed": best,
        "ratio": round(fixed[best] / medians["auto"], 3),
        "identical": len(said) == 1,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=float, nargs="+", default=[1.3, 2, 3, 5, 7])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    pair = load_pair("tiny")
    prompts = [record["prompt"] for record in held_out_records(options.items)]
    work = requests(pair, prompts, MAX_TOKENS)
    setup = set_up(pair)
    pair.drafter.__class__ = Spoiled
    results = []
    for slots in options.slots:
        for tokens in options.tokens:
            pair.drafter._kept = chance_for(tokens)
            timed(pair, work[: 2 * slots], slots=slots)  # warm up
            found = compare(pair, setup, work, slots, options.draft_lengths, options.repeats)
            results.append({"slots": slots, "tokens": tokens, **found})
            print(results[-1], file=sys.stderr, flush=True)
    print_line({"benchmark": "never_slower", **surroundings(), "results": results})


if __name__ == "__main__":
    main()
