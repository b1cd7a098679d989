"""Measure a pair on given answers: how many drafts greedy verification would accept.

A greedy target's answer does not depend on the drafter, so the rounds can be found afterwards:
draft from every position at once, then walk from round to round.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from dspark_batch.drafters.dspark import DSparkDrafter
from recipes.tiny.drafter import TappedTarget, block_hidden

ANCHORS_AT_ONCE = 32


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

    def report(self) -> dict[str, object]:
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
    if head is None:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    previous, state, drafts = anchor, None, []
    for k in range(hidden.shape[2]):
        bias, state = head.bias(head.embed(previous), hidden[:, :, k], state)
        previous = mx.argmax(logits[:, :, k] + bias, axis=-1).astype(mx.int32)
        drafts.append(previous)
    return mx.stack(drafts, axis=-1)


def draft_everywhere(
    drafter: DSparkDrafter, target: TappedTarget, tokens: mx.array, first: int
) -> np.ndarray:
    """Draft from every position of tokens [N, T] from `first` on; returns [N, T - first, K]."""
    features, length = target(tokens).features, tokens.shape[1]
    parts = []
    for begin in range(first, length, ANCHORS_AT_ONCE):
        position = mx.arange(begin, min(begin + ANCHORS_AT_ONCE, length), dtype=mx.int32)
        anchors = mx.broadcast_to(position, (tokens.shape[0], position.size))
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
    drafter: DSparkDrafter,
    target: TappedTarget,
    samples: Sequence[tuple[str, list[int], list[int]]],
    *,
    batch: int,
) -> dict[str, dict[str, object]]:
    """Measure on (kind, prompt, answer) samples.

    Returns:
        A report for each kind, and one for "all".
    """
    tallies: dict[str, Tally] = defaultdict(Tally)
    samples = sorted(samples, key=lambda sample: len(sample[1]))
    for begin in range(0, len(samples), batch):
        chosen = samples[begin : begin + batch]
        width = max(len(prompt) + len(answer) for _, prompt, answer in chosen)
        rows = np.zeros((len(chosen), width), np.int32)
        for row, (_, prompt, answer) in zip(rows, chosen, strict=True):
            row[: len(prompt) + len(answer)] = prompt + answer
        first = min(len(prompt) for _, prompt, _ in chosen)
        drafts = draft_everywhere(drafter, target, mx.array(rows), first)
        for (kind, prompt, answer), row in zip(chosen, drafts, strict=True):
            begin_at = len(prompt) - first
            for name in (kind, "all"):
                walk(tallies[name], answer, row[begin_at : begin_at + len(answer)])
    return {name: tallies[name].report() for name in sorted(tallies)}
