"""Adds up the ticks of a run into the numbers that progress shows."""

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from dspark_batch.types import Completion

if TYPE_CHECKING:
    from dspark_batch.output.report import Tick

# Rows come in bursts: "now" looks back over this long, and over at least this many bursts.
_RECENT_S = 30.0
_RECENT_BURSTS = 8
_BURST_S = 1.0


class Meter:
    """The state of a run as its ticks tell it; resumed rows are done, but they are not speed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started: float | None = None  # when decoding began; None: not yet
        self._recent: deque[tuple[float, int]] = deque()  # (when, new_tokens) of recent bursts
        self._committed = 0  # tokens that rounds committed, bonus included
        self._rounds = 0
        self._prompt_tokens = self._cached_tokens = 0  # of all turns
        self.tick: Tick | None = None  # the latest; None: nothing has happened

    def add(self, tick: "Tick") -> None:
        """Count one tick."""
        self.tick = tick
        if self._started is None and tick.stage == "decode":
            self._started = self._clock()
            self._recent.append((self._started, tick.new_tokens))
        if isinstance(tick.outcome, Completion):
            self._committed += sum(tick.outcome.accept_lengths)
            self._rounds += len(tick.outcome.accept_lengths)
            self._prompt_tokens += sum(turn.prompt_tokens for turn in tick.outcome.turns)
            self._cached_tokens += sum(turn.cached_tokens for turn in tick.outcome.turns)
            self._add_recent(tick.new_tokens)

    @property
    def elapsed_s(self) -> float:
        """Seconds since decoding began."""
        return 0.0 if self._started is None else self._clock() - self._started

    @property
    def tokens_per_s(self) -> float:
        """Tokens of finished completions per second since decoding began."""
        if self.tick is None or self.elapsed_s <= 0:
            return 0.0
        return self.tick.new_tokens / self.elapsed_s

    @property
    def recent_tokens_per_s(self) -> float:
        """The same over the recent bursts only."""
        if not self._recent:
            return 0.0
        (began, tokens_then), (_, tokens_now) = self._recent[0], self._recent[-1]
        span = self._clock() - began
        return (tokens_now - tokens_then) / span if span > 0 else 0.0

    @property
    def accept_length(self) -> float | None:
        """Mean tokens per round, bonus included; None before the first round."""
        return self._committed / self._rounds if self._rounds else None

    @property
    def prefix_hits(self) -> float | None:
        """Share of the prompt tokens that came from the prefix cache; None before the first."""
        return self._cached_tokens / self._prompt_tokens if self._prompt_tokens else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the last item at the mean pace; None before an item has shown the pace."""
        tick = self.tick
        if tick is None or tick.done <= tick.resumed:
            return None
        return (tick.total - tick.done) * self.elapsed_s / (tick.done - tick.resumed)

    def _add_recent(self, new_tokens: int) -> None:
        now = self._clock()
        burst_began = self._recent[-1][0]
        if len(self._recent) > 1 and now - burst_began < _BURST_S:
            self._recent[-1] = (burst_began, new_tokens)
        else:
            self._recent.append((now, new_tokens))
        while len(self._recent) > _RECENT_BURSTS + 1 and now - self._recent[0][0] > _RECENT_S:
            self._recent.popleft()
