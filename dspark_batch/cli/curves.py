"""A training while it goes on: curves in a terminal, else a line every 30 s."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self, TextIO

from dspark_batch.wording import count

if TYPE_CHECKING:
    from rich.text import Text

    from dspark_batch.train.training import Lesson

_EVERY_S = 30.0
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 50
_SHOWN = {"loss": "loss", "accept_length": "accept length, expected"}


class LessonLines:
    """Progress for logs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._doing, self._written_at = "", 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *rest: object) -> None:
        pass

    def __call__(self, lesson: "Lesson") -> None:
        """Write a line when something new begins, every 30 s, and at the last step."""
        now = self._clock()
        is_new, is_last = lesson.doing != self._doing, 0 < lesson.steps == lesson.step
        if is_new or is_last or now - self._written_at >= _EVERY_S:
            self._doing, self._written_at = lesson.doing, now
            self._stream.write(f"{lesson_text(lesson)}\n")
            self._stream.flush()


class Curves:
    """A live display of how the loss falls; it disappears when the training ends."""

    def __init__(self, notice: Callable[[], str]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._notice, self._lines = notice, [""]
        console = Console(stderr=True)
        self._live = Live(console=console, get_renderable=self._frame, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._live.transient = kind is None
        self._live.stop()

    def __call__(self, lesson: "Lesson") -> None:
        """Say what the next frame shows."""
        lines = [lesson_text(lesson)]
        for name, label in _SHOWN.items():
            values = [point[name] for point in lesson.curve]
            lines += [f"{spark(values)}  {label}"] if values else []
        self._lines = lines

    def _frame(self) -> "Text":
        from rich.text import Text

        lines = filter(None, [*self._lines, self._notice()])
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


def lesson_text(lesson: "Lesson") -> str:
    """Say in a line how far a training is."""
    if lesson.doing != "training" or not lesson.curve:
        return lesson.doing
    last = lesson.curve[-1]
    return (
        f"step {count(lesson.step)} of {count(lesson.steps)} · loss {last['loss']:.3f} · "
        f"accept length {last['accept_length']:.2f} expected"
    )


def spark(values: Sequence[float]) -> str:
    """Draw values as bars, the last ones if they are many."""
    shown = values if len(values) <= _WIDTH else values[:: -(-len(values) // _WIDTH)]
    least, most = min(shown), max(shown)
    step = (most - least) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - least) / step)] for value in shown)
