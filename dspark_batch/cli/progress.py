"""Progress on stderr: a bar in a terminal, else a plain line every 30 s."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Self, TextIO

from dspark_batch.cli.meter import Meter
from dspark_batch.wording import count, duration, size, speed

if TYPE_CHECKING:
    from dspark_batch.output.report import Tick

STAGE_TEXT = {"load": "loading the models", "decode": "decoding", "finish": "writing the output"}
_EVERY_S = 30.0
_JSON_EVERY_S = 1.0


def is_live(*, quiet: bool, as_json: bool = False) -> bool:
    """Whether progress is a display that is drawn again and again."""
    in_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return in_terminal and not (quiet or as_json)


def no_row(tick: "Tick") -> str:
    """Show no row."""
    return ""


def watch(
    *,
    quiet: bool,
    as_json: bool = False,
    notice: Callable[[], str] = str,
    rows: Callable[["Tick"], str] = no_row,
) -> "AbstractContextManager[Callable[[Tick], None]]":
    """Choose how to show a run: the result is called with every tick.

    Args:
        quiet: show nothing.
        as_json: for programs.
        notice: what a live display says below the rest; "": nothing.
        rows: what a person is shown of the row that a tick brings; "": nothing.
    """
    if as_json:
        return JsonLines(sys.stderr)
    if quiet:
        return nullcontext(lambda tick: None)
    if is_live(quiet=quiet):
        from dspark_batch.cli.bar import Bar  # rich is slow to import

        return Bar(notice=notice, rows=rows)
    return Lines(sys.stderr, rows=rows)


class Lines:
    """Progress for logs: a line when a stage begins, every 30 s, and at the end."""

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        rows: Callable[["Tick"], str] = no_row,
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._rows = rows
        self._meter = Meter(clock)
        self._stage: str | None = None  # of the last line; None: nothing written
        self._doing = ""  # of the last tick
        self._written_at = 0.0

    def __call__(self, tick: "Tick") -> None:
        """Count one tick, and write a line if it is time."""
        self._meter.add(tick)
        if tick.stage != self._stage:
            self._stage = tick.stage
            self._write(STAGE_TEXT[tick.stage])
        elif self._is_new(tick) or self._clock() - self._written_at >= _EVERY_S:
            doing = [tick.doing] if tick.doing else []
            texts = [items_text(self._meter), *speed_texts(self._meter)]
            self._write(*[*texts, *doing] if tick.stage == "decode" else doing or texts)
        self._doing = tick.doing
        if row := self._rows(tick):
            self._say(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._meter.tick is not None:
            self._write(items_text(self._meter), *speed_texts(self._meter))

    def _is_new(self, tick: "Tick") -> bool:
        """Whether it is something else than before, and not the same further on, or again."""
        what, _, how_far = tick.doing.partition(",")
        return bool(what) and not how_far and tick.doing != self._doing and tick.stage != "decode"

    def _write(self, *texts: str) -> None:
        self._written_at = self._clock()
        self._say(", ".join(texts))

    def _say(self, text: str) -> None:
        with suppress(OSError):  # whoever read the log is gone; the run goes on without
            self._stream.write(f"dspark-batch: {text}\n")
            self._stream.flush()


class JsonLines:
    """Progress for programs: one JSON object per line, at most one a second for each stage."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._meter = Meter(clock)
        self._stage: str | None = None  # of the last line; None: nothing written
        self._written_at = 0.0

    def __call__(self, tick: "Tick") -> None:
        """Count one tick, and write an object if it is time."""
        self._meter.add(tick)
        if tick.stage != self._stage or self._clock() - self._written_at >= _JSON_EVERY_S:
            self._write(tick)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._meter.tick is not None:
            self._write(self._meter.tick)

    def _write(self, tick: "Tick") -> None:
        self._stage, self._written_at = tick.stage, self._clock()
        with suppress(OSError):  # whoever read it is gone; the run goes on without
            self._stream.write(json.dumps(_as_object(tick, self._meter)) + "\n")
            self._stream.flush()


def _as_object(tick: "Tick", meter: Meter) -> dict[str, object]:
    """Say all that progress knows; null: not known, or not yet."""
    gauge = tick.gauge
    return {
        "stage": tick.stage,
        "doing": tick.doing or None,
        "total": tick.total,
        "done": tick.done,
        "failed": tick.failed,
        "resumed": tick.resumed,
        "new_tokens": tick.new_tokens,
        "tokens_per_s": meter.tokens_per_s,
        "recent_tokens_per_s": meter.recent_tokens_per_s,
        "accept_length": meter.accept_length,
        "elapsed_s": meter.elapsed_s,
        "remaining_s": meter.remaining_s,
        "busy_slots": gauge and gauge.busy_slots,
        "slots": gauge and gauge.slots,
        "prefix_hits": meter.prefix_hits,
        "memory_bytes": gauge and gauge.memory_bytes,
        "workers": (gauge and [*gauge.workers]) or None,
    }


def items_text(meter: Meter) -> str:
    """Say how far the run is: `312/1,000 items, 14 min 20 s left`."""
    tick = meter.tick
    if tick is None:
        return ""
    items = f"{count(tick.done)}/{count(tick.total)} items"
    left = meter.remaining_s
    return f"{items}, {duration(left)} left" if left else items


def speed_texts(meter: Meter) -> list[str]:
    """Say how it goes: speed now and mean, accept length, failures, rows of earlier starts."""
    tick = meter.tick
    texts = []
    if meter.tokens_per_s:
        now, mean = speed(meter.recent_tokens_per_s), speed(meter.tokens_per_s)
        texts.append(f"{now} tokens/s now, {mean} mean")
    if meter.accept_length is not None:
        texts.append(f"accept length {meter.accept_length:.2f}")
    if tick is not None and tick.failed:
        texts.append(f"{count(tick.failed)} failed")
    if tick is not None and tick.resumed:
        texts.append(f"{count(tick.resumed)} resumed")
    return texts


def engine_texts(meter: Meter) -> list[str]:
    """Say how full the engine is."""
    gauge = None if meter.tick is None else meter.tick.gauge
    if gauge is None:
        return []
    hits = f"{meter.prefix_hits:.0%} prefix hits" if meter.prefix_hits else ""
    dead = sum(worker["deaths"] for worker in gauge.workers)
    team = f"{len(gauge.workers)} workers" + (f", {count(dead)} died" if dead else "")
    return [
        *([team] if gauge.workers else []),
        f"{gauge.busy_slots:.1f} of {gauge.slots} slots busy",
        *([hits] if hits else []),
        f"{size(gauge.memory_bytes)} of memory, {size(gauge.peak_memory_bytes)} at most",
    ]
