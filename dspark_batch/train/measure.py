"""Measure a pair on given answers: how many drafts greedy verification would accept.

A target's answer does not depend on the drafter, so the rounds can be found afterwards: draft from
every position at once, then walk from round to round.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.numerics.rules import Greedy
from dspark_batch.train.blocks import block_hidden
from dspark_batch.train.teacher import TappedTarget
from dspark_batch.types import Json

ALL = "all"

_MOST_LOGITS = 64 << 20  # of the slots that are drafted at once


class Sample(NamedTuple):
    """An answer that no training saw."""

    group: str  # what it is counted with
    prompt: Sequence[int]  # token ids
    answer: Sequence[int]


@dataclass(slots=True)
class Tally:
    """Counts over rounds; grows."""

    rounds: int = 0
    tokens: int = 0  # committed in rounds, bonus included
    survived: list[int] = field(default_factory=list)  # rounds that accepted more than k drafts

    def add(self, accepted: int, committed: int, size: int) -> None:
        """Count one round."""
        self.survived = self.survived or [0] * size
        self.rounds, self.tokens = self.rounds + 1, self.tokens + committed
        for k in range(accepted):
            self.survived[k] += 1

    def report(self) -> dict[str, Json]:
        """Return the accept length, and the share of rounds that accepted draft k, by k."""
        rounds = max(self.rounds, 1)
        return {
            "rounds": self.rounds,
            "tokens": self.tokens,
            "accept_length": round(self.tokens / rounds, 3),
            "accept_rate": [round(count / rounds, 3) for count in self.survived],
        }


def draft_greedily(drafter: DSparkDrafter, hidden: mx.array, anchor: mx.array) -> mx.array:
    """Draft the slots of blocks [N, A, K, E] one after the other from anchors [N, A].

    Returns:
        [N, A, K] int32.
    """
    logits, head = drafter.base_logits(hidden), drafter.markov_head
    rule, among = Greedy(), drafter.among
    if head is None:
        return rule.draft(logits, 0, among).astype(mx.int32)
    previous, state, drafts = anchor, None, []
    for k in range(hidden.shape[2]):
        bias, state = head.bias(head.embed(previous), hidden[:, :, k], state)
        previous = rule.draft(logits[:, :, k] + bias, k, among).astype(mx.int32)
        drafts.append(previous)
    return mx.stack(drafts, axis=-1)


def draft_everywhere(
    drafter: DSparkDrafter, features: mx.array, tokens: mx.array, first: int
) -> np.ndarray:
    """Draft from every position of tokens [N, T] from `first` on; returns [N, T - first, K]."""
    rows, length = tokens.shape
    slots = _MOST_LOGITS // (rows * drafter.block_size * drafter.config.vocab_size)
    at_once, parts = max(1, slots), []
    for begin in range(first, length, at_once):
        position = mx.arange(begin, min(begin + at_once, length), dtype=mx.int32)
        anchors = mx.broadcast_to(position, (rows, position.size))
        hidden = block_hidden(drafter, features, tokens, anchors)
        anchor = mx.take_along_axis(tokens, anchors, axis=1)
        parts.append(draft_greedily(drafter, hidden, anchor))
        mx.eval(parts[-1])
    return np.array(mx.concatenate(parts, axis=1))


def walk(tally: Tally, answer: Sequence[int], drafts: np.ndarray) -> None:
    """Count the rounds of one answer.

    Args:
        tally: counts them.
        answer: n token ids; the first comes from prefill and is the first anchor.
        drafts: [n, K], what was drafted after each token of the answer.
    """
    anchor, last, size = 0, len(answer) - 1, drafts.shape[1]
    while anchor < last:
        rest = answer[anchor + 1 : anchor + 1 + size]
        agrees = [int(a == b) for a, b in zip(drafts[anchor], rest, strict=False)]
        accepted = int(np.cumprod(agrees).sum())
        committed = min(accepted + 1, last - anchor)
        tally.add(accepted, committed, size)
        anchor += committed


def measure(
    drafter: DSparkDrafter, target: TappedTarget, samples: Iterable[Sample], *, batch: int
) -> dict[str, dict[str, Json]]:
    """Measure on samples, so many together.

    Returns:
        A report for each group, and one for `ALL`.
    """
    tallies: dict[str, Tally] = defaultdict(Tally)
    tallies[ALL] = Tally()
    samples = sorted(samples, key=lambda sample: len(sample.prompt) + len(sample.answer))
    for begin in range(0, len(samples), batch):
        chosen = samples[begin : begin + batch]
        width = max(len(each.prompt) + len(each.answer) for each in chosen)
        rows = np.zeros((len(chosen), width), np.int32)
        for row, each in zip(rows, chosen, strict=True):
            row[: len(each.prompt) + len(each.answer)] = [*each.prompt, *each.answer]
        first, tokens = min(len(each.prompt) for each in chosen), mx.array(rows)
        drafts = draft_everywhere(drafter, target(tokens), tokens, first)
        for each, row in zip(chosen, drafts, strict=True):
            begin_at = len(each.prompt) - first
            for name in {each.group, ALL}:
                walk(tallies[name], each.answer, row[begin_at : begin_at + len(each.answer)])
    return {name: tallies[name].report() for name in [ALL, *sorted(tallies.keys() - {ALL})]}
