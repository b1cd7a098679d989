"""Acceptance of both sampling rules against what is possible, on the bundled pair.

    python -m benchmarks.sampling [--items 48] [--temperatures 0.7 1.0]

Prints one JSON line. A draft counts when all before it in its block were accepted. With TV the
total variation distance of target and drafter there, the rejection rule accepts with probability
1 - TV, which is the most that is possible, the coupled rule with (1 - TV) / (1 + TV) at least.
"""

import argparse
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

import dspark_batch.answers.sampling
from benchmarks.common import held_out_records, print_line, requests, surroundings
from dspark_batch.engine.engine import Engine
from dspark_batch.numerics.rules import Coupled, Rejection
from dspark_batch.numerics.sampling import probabilities
from dspark_batch.pair import load_pair
from dspark_batch.types import Sampling

RULES = {"coupled": Coupled, "rejection": Rejection}
MAX_TOKENS, SLOTS = 192, 8


class Watched:
    """A rule that notes, for each draft that was reached, the distance and whether it stayed."""

    def __init__(self, rule, notes, settings, chance):
        self.rule, self.notes, self.settings = rule(settings, chance), notes, settings
        self.first = self.rule.first
        self.draft_logits = []

    def draft(self, logits, k, among=None):
        self.draft_logits.append(logits if among is None else among.spread(logits))
        return self.rule.draft(logits, k, among)

    def verify(self, drafts, verify_len, logits):
        accepted, bonus = self.rule.verify(drafts, verify_len, logits)
        p = probabilities(logits[:, :-1], self.settings)
        q = probabilities(mx.stack(self.draft_logits, axis=1), self.settings)
        overlap = np.array(mx.minimum(p, q).sum(axis=-1))
        position, reached = np.arange(drafts.shape[1]), np.array(accepted)[:, None]
        is_reached = (position <= reached) & np.array(self.settings.is_sampled)[:, None]
        for slot, k in np.argwhere(is_reached):
            self.notes.append((k, overlap[slot, k], k < reached[slot, 0]))
        return accepted, bonus


def measure(pair, work, name, temperature):
    """Answer all of the work under one rule and sum up its notes."""
    notes, rules = [], dspark_batch.answers.sampling.RULES
    rules[name] = partial(Watched, RULES[name], notes)
    sampling = Sampling(temperature=temperature)
    warm = [replace(request, sampling=sampling) for request in work]
    answers = list(Engine(pair, slots=SLOTS, sampling=name).generate(warm))
    rules[name] = RULES[name]
    k, overlap, stayed = (np.array(column, float) for column in zip(*notes, strict=True))
    columns = {
        "accepted": stayed,
        "most": overlap,  # 1 - TV
        "coupled_bound": overlap / (2 - overlap),  # (1 - TV) / (1 + TV)
    }
    rounds = sum(len(answer.accept_lengths) for answer in answers)
    return {
        "temperature": temperature,
        "rule": name,
        "drafts": len(notes),
        **{key: round(column.mean(), 4) for key, column in columns.items()},
        "standard_error": round(stayed.std() / len(notes) ** 0.5, 4),
        "accepted_by_position": [round(stayed[k == i].mean(), 3) for i in range(int(k.max()) + 1)],
        "most_by_position": [round(overlap[k == i].mean(), 3) for i in range(int(k.max()) + 1)],
        "mean_accept_length": round(sum(sum(a.accept_lengths) for a in answers) / rounds, 3),
        "tokens": sum(len(answer.token_ids) for answer in answers),
    }


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    chosen = parser.parse_args()
    pair = load_pair("tiny")
    records = held_out_records(chosen.items)
    work = requests(pair, [record["prompt"] for record in records], MAX_TOKENS)
    results = [
        measure(pair, work, name, temperature)
        for temperature in chosen.temperatures
        for name in RULES
    ]
    print_line({"benchmark": "sampling", **surroundings(), "items": len(work), "results": results})


if __name__ == "__main__":
    main()
