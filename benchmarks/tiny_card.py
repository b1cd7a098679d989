"""The numbers of the bundled pair's data card, by the project's own engine.

    python -m benchmarks.tiny_card [--per-kind 40] [--slots 8] [--drafter DIR] [--system]

Greedy, block 7, held-out tasks only. Prints one JSON line: the share of answers that are right to
the letter, by kind (kinds with free wording have none), accept length (bonus included) by kind and
over all, and the share of rounds that accepted draft k, by k. `--drafter` measures another drafter
for the same target, such as the DFlash twin that the recipe leaves in OUT/twin; `--system` puts a
long system prompt in front of every task.
"""

import argparse
from collections import defaultdict
from random import Random

from benchmarks.common import print_line, requests, surroundings
from dspark_batch.engine.engine import Engine
from dspark_batch.pair import load_pair
from dspark_batch.train.measure import Tally
from recipes.tiny.corpus import held_out_turns
from recipes.tiny.recipe import HELD_OUT_SEED
from recipes.tiny.systems import ROLES, RULES

MAX_TOKENS = 400


def exact_match(turns, completions):
    """Share of completions equal to the right answer, by kind and over all."""
    right = defaultdict(list)
    for turn, completion in zip(turns, completions, strict=True):
        if turn.task.exact:
            for name in (turn.kind, "all"):
                right[name].append(completion.text == turn.task.answer)
    return {name: round(sum(each) / len(each), 4) for name, each in sorted(right.items())}


def acceptance(turns, completions, block_size):
    """Accept length and accept rate, by kind and over all, pooled over rounds."""
    tallies = defaultdict(Tally)
    for turn, completion in zip(turns, completions, strict=True):
        for accepted, committed in zip(
            completion.num_accepted, completion.accept_lengths, strict=True
        ):
            for name in (turn.kind, "all"):
                tallies[name].add(accepted, committed, block_size)
    return {name: tally.report() for name, tally in sorted(tallies.items())}


def long_system_prompt():
    """Take a role and fifteen rules, as the corpus does."""
    rng = Random("card")
    return " ".join([rng.choice(ROLES), *rng.sample(RULES, 15)])


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-kind", type=int, default=40)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--drafter", help="directory of another drafter for the bundled target")
    parser.add_argument("--system", action="store_true", help="with a long system prompt")
    options = parser.parse_args()

    pair = load_pair("tiny", drafter=options.drafter)
    turns = held_out_turns(HELD_OUT_SEED, options.per_kind)
    system = long_system_prompt() if options.system else None
    work = requests(pair, [turn.task.prompt for turn in turns], MAX_TOKENS, system)
    outcomes = Engine(pair, slots=options.slots).generate(work)
    completions = sorted(outcomes, key=lambda each: each.item.index)
    print_line(
        {
            "benchmark": "tiny_card",
            **surroundings(),
            "dtype": pair.config.dtype,
            "drafter": options.drafter or "bundled",
            "system_prompt_tokens": len(pair.tokenizer.render(_message(system))) if system else 0,
            "items": len(turns),
            "answer_tokens": round(sum(len(c.token_ids) for c in completions) / len(turns), 1),
            "exact_match": exact_match(turns, completions),
            "acceptance": acceptance(turns, completions, pair.drafter.block_size),
        }
    )


def _message(system):
    return [{"role": "system", "content": system}]


if __name__ == "__main__":
    main()
