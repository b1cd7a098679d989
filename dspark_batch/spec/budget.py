"""How long a start may take: it ends by taking no new item, never by cutting one short."""

import re
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta

from dspark_batch.errors import UsageError
from dspark_batch.types import Completion, Outcome

_RECENT = 32  # items whose longest stands for the next one
_SECONDS_BY_UNIT = {"d": 24 * 3600, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile("".join(f"(?:([0-9]{{1,9}}){unit})?" for unit in _SECONDS_BY_UNIT))


class Budget:
    """The time that is left for new items; measured by the clock that nobody sets."""

    def __init__(
        self,
        deadline: str | None,
        max_runtime: str | None,
        *,
        now: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin now.

        Args:
            deadline: the next time that local clocks show this, "07:00"; None: no end.
            max_runtime: as `seconds_of` reads it; None: no end.
            now: seconds since 1970; None: this machine's.
            clock: seconds that only grow.
        """
        limits = [] if max_runtime is None else [seconds_of(max_runtime)]
        if deadline is not None:
            limits.append(seconds_until(deadline, time.time() if now is None else now))
        self._clock = clock
        self._ends = clock() + min(limits) if limits else None
        self.is_spent = False  # once an item was refused, none may begin
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, outcome: Outcome) -> None:
        """Learn from an item how long one takes."""
        if isinstance(outcome, Completion):
            self._recent.append(sum(turn.prefill_s + turn.decode_s for turn in outcome.turns))

    def allows_one_more(self) -> bool:
        """Decide whether a new item may begin: it may take as long as the longest recent one."""
        if self._ends is not None:
            left = self._ends - self._clock()
            self.is_spent = self.is_spent or left <= max(self._recent, default=0.0)
        return not self.is_spent


def seconds_of(text: str) -> float:
    """Read a duration such as "6h", "1h30m", "45m", "90s" or "7d".

    Raises:
        UsageError: it is something else, or nothing.
    """
    parts = _DURATION.fullmatch(text)
    if not text or parts is None:
        raise UsageError(f"max_runtime is {text!r}, expected a duration such as 6h, 1h30m or 90s.")
    seconds = sum(
        int(part or 0) * unit
        for part, unit in zip(parts.groups(), _SECONDS_BY_UNIT.values(), strict=True)
    )
    if not seconds:
        raise UsageError(f"max_runtime is {text!r}, expected more than nothing.")
    return seconds


def seconds_until(deadline: str, now: float) -> float:
    """Count the seconds from `now` until local clocks next show a time.

    Raises:
        UsageError: the time is no time.
    """
    parts = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", deadline)
    if parts is None:
        raise UsageError(f"deadline is {deadline!r}, expected a time of the day such as 07:00.")
    hour, minute = map(int, parts.groups())
    local = datetime.fromtimestamp(now).astimezone().replace(tzinfo=None)
    day = local.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if day <= local:
        day += timedelta(days=1)
    return day.timestamp() - now  # a naive time is local: where clocks change, this knows
