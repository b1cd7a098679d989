"""Where the time of the engine goes."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from dspark_batch.numerics.rows import VERDICTS

# Rounds. The first ones compile passes; a sample loses what a round gains by being queued.
_FIRST_SAMPLE, _SAMPLE_EVERY = 16, 1024
_AT_ONCE_S = 1e-4  # a round that comes so quickly was over before the host asked for it


@dataclass(slots=True)
class _Sent:
    """A round that the device has."""

    launched: float
    has_prompts: bool  # that went along
    is_sample: bool
    late_s: float  # how long the host took to send it, while the one before might have ended


class Clock:
    """Splits the engine's time, from the end of one round to the end of the next.

    A round is queued as a whole, so nobody sees what its parts take. Round 17, 33, 65 and
    so on, and later every 1024th, is a sample: its parts run one after the other, each one waited
    for. Evaluating earlier changes no value.

    Args:
        now: seconds.

    Attributes:
        round_s: seconds in rounds.
        prefill_s: seconds that rounds took longer than the one before because prompts went along.
        idle_s: seconds in which the device may have had nothing to do, at most: while the host
            prepared a round, and behind a round that was over before the host asked for it.
        draft_s: seconds of the samples in the drafter, its context included.
        verify_s: seconds of the samples in the target.
        sampled_rounds: that were timed part by part.
        rounds: of the engine.
        slot_rounds: of all slots that were not free.
        prompt_tokens: that went through the target.
        answers: that ended.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.round_s = self.prefill_s = self.idle_s = self.draft_s = self.verify_s = 0.0
        self.sampled_rounds = self.rounds = self.slot_rounds = self.prompt_tokens = 0
        self.answers = 0
        self._usual_s = 0.0  # of a round without prompts
        self._num_verdicts = len(VERDICTS)  # that were known when the last round ended
        self._has_prompts = self._is_sample = False
        self._next_sample = _FIRST_SAMPLE
        self._now = now
        self._began = self._part_began = self._asked = now()
        self._sent: deque[_Sent] = deque()
        self._drafts_sent: float | None = None
        self._follows = False  # the round another one, without a pause of the device
        self._waited_s = 0.0  # for the parts of this round

    def begin(self) -> None:
        """The time of the next round begins; with the end of a round it does so by itself."""
        self._has_prompts = False
        self._begin()

    def add_prompts(self) -> None:
        """Prompts go along."""
        self._has_prompts = True

    def end_answers(self, number: int) -> None:
        """So many answers ended."""
        self.answers += number

    def leave_out(self, seconds: float) -> None:
        """Somebody else had the device for so long, since the round began."""
        self._began += seconds
        for sent in self._sent:
            sent.launched += seconds

    @property
    def splits(self) -> bool:
        """Whether this round is a sample, or the next one may be."""
        return any(sent.is_sample for sent in self._sent) or self.rounds >= self._next_sample

    def begin_parts(self, *left: mx.array) -> None:
        """The parts of the round begin; `left` is what may still run of the one before."""
        if self.rounds >= self._next_sample and not self._has_prompts:
            self._is_sample = True
            self.sampled_rounds += 1
            self._next_sample = self.rounds + min(self.rounds, _SAMPLE_EVERY)
            self._part(left)

    def drafted(self, *results: mx.array) -> None:
        """The drafter's pass is queued, or what extends its context."""
        if self._is_sample:
            self.draft_s += self._part(results)

    def verified(self, *results: mx.array | None) -> None:
        """The target's pass is queued."""
        if self._is_sample:
            self.verify_s += self._part(results)

    def send_drafts(self) -> None:
        """The device gets drafts to make, of this round or of the next."""
        self._drafts_sent = self._now()

    def launch(self, num_active: int) -> None:
        """The device gets a round; it may have the round before still."""
        launched = self._now()
        late_s = launched - self._began - self._waited_s
        if self._drafts_sent is not None and self.sampled_rounds:
            since = launched - max(self._began, self._drafts_sent)
            late_s -= min(since, self.draft_s / self.sampled_rounds)
        if not self._sent:
            self.idle_s += max(0.0, late_s)
        self._sent.append(_Sent(launched, self._has_prompts, self._is_sample, max(0.0, late_s)))
        self._has_prompts = self._is_sample = False
        self._drafts_sent = None
        self.rounds += 1
        self.slot_rounds += num_active

    def wait(self) -> None:
        """There was no round."""
        self._follows = False
        if self._has_prompts:
            self.prefill_s += self._now() - self._began

    def ask(self) -> None:
        """The host has nothing else to do, and wants the round."""
        self._asked = self._now()

    def end(self) -> float | None:
        """The round is over; return its seconds, from the end of the one before.

        None: prompts went along, it was a sample, none came right before, or products of a new
        shape were tested meanwhile.
        """
        over, sent = self._now(), self._sent.popleft()
        if over - self._asked < _AT_ONCE_S:  # the next one, if it is there, may have come late
            self.idle_s += self._sent[0].late_s if self._sent else self._asked - sent.launched
        total, follows, self._follows = over - self._began, self._follows, True
        has_tested, self._num_verdicts = len(VERDICTS) > self._num_verdicts, len(VERDICTS)
        is_usual = not (sent.has_prompts or sent.is_sample or has_tested)
        if sent.has_prompts:
            self.round_s += min(total, self._usual_s)
            self.prefill_s += max(0.0, total - self._usual_s)
        else:
            self.round_s += total
        if is_usual:
            self._usual_s = total
        self._begin()
        return total if is_usual and follows else None

    def _begin(self) -> None:
        self._began, self._waited_s = self._now(), 0.0

    def _part(self, results: tuple[mx.array | None, ...]) -> float:
        """Wait for a part of the round; return what it took since the part before, in seconds."""
        queued = self._now()
        mx.eval(*results)
        began, self._part_began = self._part_began, self._now()
        self._waited_s += self._part_began - queued
        return self._part_began - began
