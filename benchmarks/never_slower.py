"""Drafts of any worth: the automatic draft length against each fixed one, none included.

    python -m benchmarks.never_slower [--items 100] [--slots 1 4 16] [--tokens 1.3 2 3 5 7]
                                      [--draft-lengths 0 1 2 3 4 5 6 7]

The bundled pair answers held-out items. Its drafts, nearly always right, are spoiled at random so
that a round of seven gives about as many tokens as told. The contestants decode by turns of half a
second in one process, so a machine that becomes slower is slower for all of them. Fixed draft
lengths that are far behind leave early. `ratio` is the automatic draft length's tokens per second
over those of the best fixed one: 1 is as good, less is slower.
"""

import argparse
import sys
import time

import dspark_batch  # noqa: F401  the BLAS, before MLX

import mlx.core as mx  # isort: skip

from benchmarks.common import held_out_records, print_line, requests, surroundings
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.numerics.chance import Chance
from dspark_batch.pair import load_pair

MAX_TOKENS = 64
TURN_S = 0.5
BEHIND = 0.8  # of the best; who is slower than that leaves after a fifth of the job


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


class Contestant:
    """An engine with a job, that decodes when it is its turn."""

    def __init__(self, pair, work, **settings):
        self._engine = Engine(pair, **settings)
        for request in work:
            self._engine.add(request)
        self._left = time.perf_counter()
        self._rounds = 0
        self.seconds = 0.0
        self.answers = {}

    @property
    def is_done(self):
        return self._engine.is_idle

    def turn(self):
        """Decode for a while."""
        began = time.perf_counter()
        self._engine.leave_out(began - self._left)
        while time.perf_counter() - began < TURN_S and not self.is_done:
            for answer in self._engine.step():
                self.answers[answer.item.index] = answer.token_ids
                self._rounds += len(answer.accept_lengths)
        mx.synchronize()  # its round ends in its own time
        self._left = time.perf_counter()
        self.seconds += self._left - began

    @property
    def rate(self):
        """Tokens per second, those of answers that go on included."""
        growing = self._engine._slots.active
        return (self._finished() + sum(len(each.token_ids) for each in growing)) / self.seconds

    @property
    def accept_length(self):
        return round(self._finished() / max(1, self._rounds), 2)

    def _finished(self):
        return sum(map(len, self.answers.values()))


def compare(pair, setup, work, slots, draft_lengths):
    """Let all decode by turns; all must say the same."""
    fixed = {str(k): Contestant(pair, work, slots=slots, draft_length=k) for k in draft_lengths}
    auto = Contestant(pair, work, slots=slots, lengths=setup.lengths, costs=setup.costs)
    left = {}
    while not auto.is_done:
        for contestant in (*fixed.values(), auto):
            if not contestant.is_done:
                contestant.turn()
        if len(auto.answers) >= len(work) // 5:
            best = max(each.rate for each in fixed.values())
            left |= {k: each for k, each in fixed.items() if each.rate < BEHIND * best}
            fixed = {k: each for k, each in fixed.items() if k not in left}
    for contestant in fixed.values():
        while not contestant.is_done:
            contestant.turn()
    best = max(fixed, key=lambda k: fixed[k].rate)
    everyone = {**left, **fixed, "auto": auto}
    said = [answer for each in everyone.values() for answer in each.answers.items()]
    same = all(auto.answers[index] == token_ids for index, token_ids in said)
    return {
        "tokens_per_s": {k: round(each.rate, 1) for k, each in everyone.items()},
        "accept_length": {k: each.accept_length for k, each in everyone.items()},
        "left_early": sorted(left),
        "best_fixed": best,
        "ratio": round(auto.rate / fixed[best].rate, 3),
        "identical": same,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=float, nargs="+", default=[1.3, 2, 3, 5, 7])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=list(range(8)))
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
            list(Engine(pair, slots=slots).generate(work[: 2 * slots]))  # warm up
            found = compare(pair, setup, work, slots, options.draft_lengths)
            results.append({"slots": slots, "tokens": tokens, **found})
            print(results[-1], file=sys.stderr, flush=True)
    print_line({"benchmark": "never_slower", **surroundings(), "results": results})


if __name__ == "__main__":
    main()
