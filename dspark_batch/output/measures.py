"""The numbers behind the pictures of a report: one pass over the rows, a few bytes for each."""

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dspark_batch.record.rows import Row, Speculation, committed_in, ratio

_BINS = 10
_MOST_STRETCHES = 60
_ROWS_PER_STRETCH = 8  # fewer make a picture of chance


class Pace(NamedTuple):
    """How fast a job went over its time at work: the pauses between its starts are taken out."""

    stretch_s: float  # length of one of the equal stretches
    tokens_per_s: Sequence[float]  # by stretch
    resumed_at_s: Sequence[float]  # where later starts went on

    @property
    def worked_s(self) -> float:
        """The whole time at work."""
        return self.stretch_s * len(self.tokens_per_s)

    @property
    def mean_tokens_per_s(self) -> float:
        """Over the whole time at work."""
        return sum(self.tokens_per_s) / len(self.tokens_per_s)


@dataclass(slots=True)
class Bin:
    """Drafts whose confidence is about the same."""

    drafts: int = 0
    confidence: float = 0.0  # sum of probabilities
    accepted: int = 0


@dataclass(slots=True)
class Group:
    """The answers to the items that share a value in a column."""

    answers: int = 0
    rounds: int = 0
    committed: int = 0  # by rounds

    @property
    def accept_length(self) -> float | None:
        """Mean tokens per round, bonus included; None: no rounds."""
        return ratio(self.committed, self.rounds)


@dataclass(slots=True)
class Measures:
    """What the rows of a job add up to."""

    prompt_lengths: "array[int]" = field(default_factory=lambda: array("q"))
    completion_lengths: "array[int]" = field(default_factory=lambda: array("q"))
    finish_reasons: Counter[str] = field(default_factory=Counter)
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    accepted_per_round: Counter[int] = field(default_factory=Counter)  # drafts -> rounds
    reached: Counter[int] = field(default_factory=Counter)  # position -> drafts judged there
    accepted: Counter[int] = field(default_factory=Counter)  # position -> drafts that stayed
    confidence_bins: list[Bin] = field(default_factory=lambda: [Bin() for _ in range(_BINS)])
    groups: dict[str, Group] = field(default_factory=dict)  # value of the chosen column
    finished_at: "array[float]" = field(default_factory=lambda: array("d"))  # Unix time, s
    tokens: "array[int]" = field(default_factory=lambda: array("q"))  # finished then

    def add(self, row: Row, finished_at: float | None, group: str | None) -> None:
        """Count one row.

        Args:
            row: our columns.
            finished_at: Unix time, s; None: unknown.
            group: which value its item has in the chosen column; None: no column was chosen.
        """
        if row["status"] != "succeeded":
            return
        tokens = row["usage"]["completion_tokens"]
        self.prompt_lengths.append(row["usage"]["prompt_tokens"])
        self.completion_lengths.append(tokens)
        self.finish_reasons[row["finish_reason"]] += 1
        self.cached_tokens += row["metrics"]["cached_tokens"]
        self._add_rounds(row["metrics"]["speculative_decoding"])
        if finished_at is not None:
            self.finished_at.append(finished_at)
            self.tokens.append(tokens)
        if group is not None:
            its = self.groups.setdefault(group, Group())
            its.answers += 1
            its.rounds += row["metrics"]["speculative_decoding"]["num_spec_steps"]
            its.committed += committed_in(row)

    def _add_rounds(self, log: Speculation) -> None:
        self.accepted_per_round.update(log["per_step_accepted"])
        per_step = log["per_step_drafted"]
        confidence = log["per_step_confidence"] or [[]] * len(per_step)
        rounds = zip(log["per_step_accepted"], per_step, confidence, strict=True)
        # A stop or a limit may have cut the last one, so it says nothing about the drafts behind.
        for accepted, drafted, logits in list(rounds)[:-1]:
            # The draft behind the last accepted one was judged too, and refused.
            num_judged = min(accepted + 1, drafted)
            self.reached.update(range(num_judged))
            self.accepted.update(range(accepted))
            for position, logit in enumerate(logits[:num_judged]):
                self._add_confidence(logit, position < accepted)

    def _add_confidence(self, logit: float, stayed: bool) -> None:
        probability = 0.5 * (1 + math.tanh(0.5 * logit))
        its = self.confidence_bins[min(int(probability * _BINS), _BINS - 1)]
        its.drafts += 1
        its.confidence += probability
        its.accepted += stayed

    @property
    def has_confidence(self) -> bool:
        """Whether confidences were logged."""
        return any(each.drafts for each in self.confidence_bins)

    def pace(self, began: Sequence[float]) -> Pace | None:
        """Follow the speed through all starts.

        Args:
            began: Unix times at which they began to decode, ascending, s.

        Returns:
            None: no start, or no row, says when it was.
        """
        if not began:
            return None
        rows = sorted(zip(self.finished_at, self.tokens, strict=True))
        finished = [when for when, _ in rows]
        worked, cuts, at_work = 0.0, [], []
        for start, end in zip(began, [*began[1:], math.inf], strict=True):
            own = finished[bisect_left(finished, start) : bisect_left(finished, end)]
            at_work += [worked + when - start for when in own]
            cuts.append(worked)
            worked = at_work[-1] if own else worked
        if not worked:
            return None
        stretches = max(1, min(_MOST_STRETCHES, len(at_work) // _ROWS_PER_STRETCH))
        stretch_s = worked / stretches
        tokens = [0] * stretches
        for when, (_, count) in zip(at_work, rows[-len(at_work) :], strict=True):
            tokens[min(int(when / stretch_s), stretches - 1)] += count
        resumed_at_s = [cut for cut in cuts[1:] if 0 < cut < worked]
        return Pace(stretch_s, [count / stretch_s for count in tokens], resumed_at_s)
