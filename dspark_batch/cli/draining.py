"""The first Ctrl-C finishes what is in flight; a second one, or the end of the grace, does not."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from dspark_batch.errors import Resumable

_STDERR = 2


class Draining:
    """Stands before the handlers of SIGINT, SIGTERM and SIGHUP while something is worth finishing.

    Args:
        grace_s: after a first signal, the time for what is in flight.
        is_shown: a live display shows the `notice`, and would swallow what is written beside it.
    """

    def __init__(self, grace_s: float, *, is_shown: bool = False) -> None:
        self._grace_s = grace_s
        self._is_shown = is_shown
        self._is_worth_it = False
        self._number: int | None = None  # of the first signal; None: there was none
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        # What is ignored or kills on the spot was meant so.
        self._before: dict[int, Callable[[int, FrameType | None], object]] = {
            number: handler for number, handler in handlers.items() if callable(handler)
        }

    def __enter__(self) -> Self:
        for number in self._before:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGALRM, self._end_of_grace)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._step_aside()
        if self._number is not None and isinstance(error, Resumable):
            self._before[self._number](self._number, None)  # raises what the signal means

    def __call__(self, *, is_worth_it: bool) -> None:
        """Take note whether something is in flight that is worth finishing."""
        self._is_worth_it = is_worth_it

    def is_asked(self) -> bool:
        """Whether the run should admit nothing more."""
        return self._number is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None or not self._is_worth_it or self._grace_s <= 0:
            self._step_aside()
            self._before[number](number, frame)
            return
        self._number = number
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        if self._is_shown:
            return
        with suppress(OSError):  # a handler may interrupt a print, so it does not print
            os.write(_STDERR, f"dspark-batch: {self.notice()}\n".encode())

    def notice(self) -> str:
        """Say what happens after a first signal; "" before."""
        if self._number is None:
            return ""
        return (
            f"stopping: what is in flight has {self._grace_s:g} s to finish; again to stop at once"
        )

    def _end_of_grace(self, number: int, frame: FrameType | None) -> None:
        self._step_aside()
        if self._number is not None:  # it is: the alarm is set behind it
            self._before[self._number](self._number, frame)

    def _step_aside(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
