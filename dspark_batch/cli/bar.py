"""Progress in a terminal: a spinner while models load, then a bar over items."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from dspark_batch.cli.meter import Meter
from dspark_batch.cli.progress import STAGE_TEXT, engine_texts, items_text, no_row, speed_texts

if TYPE_CHECKING:
    from dspark_batch.output.report import Tick

_BAR_WIDTH = 40
_REFRESHES_PER_S = 8


class Bar:
    """A live display that disappears when the run ends well, and stays when it was stopped."""

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        notice: Callable[[], str] = str,
        rows: Callable[["Tick"], str] = no_row,
    ) -> None:
        self._meter = Meter(clock)
        self._notice = notice
        self._rows = rows
        self._spinner = Spinner("dots", STAGE_TEXT["load"])
        self._live = Live(
            console=console or Console(stderr=True),
            get_renderable=self._frame,
            refresh_per_second=_REFRESHES_PER_S,
        )

    def __call__(self, tick: "Tick") -> None:
        """Count one tick; the display refreshes by itself."""
        self._meter.add(tick)
        if row := self._rows(tick):
            self._live.console.print(Text(row, no_wrap=True, overflow="ellipsis"))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._live.transient = kind is None
        self._live.stop()

    def _frame(self) -> RenderableType:
        tick = self._meter.tick
        if tick is None or tick.stage != "decode":
            text = STAGE_TEXT["load"] if tick is None else tick.doing or STAGE_TEXT[tick.stage]
            self._spinner.update(text=text)
            return self._spinner
        grid = Table.grid(padding=(0, 1))
        width = max(10, min(_BAR_WIDTH, self._live.console.width - _BAR_WIDTH))
        bar = ProgressBar(total=tick.total, completed=tick.done, width=width)
        grid.add_row(bar, Text(items_text(self._meter), no_wrap=True))
        doing = [tick.doing] if tick.doing else []
        texts = (speed_texts(self._meter), engine_texts(self._meter), doing)
        lines = [_line(each) for each in texts if each]
        notice = self._notice()
        return Group(grid, *lines, *([Text(notice)] if notice else []))


def _line(texts: list[str]) -> Text:
    return Text(" · ".join(texts), style="dim", no_wrap=True, overflow="ellipsis")
