"""The pictures of a report: inline SVG that takes its colours from the page.

matplotlib draws with the placeholder colours below; in the SVG they become CSS variables, so one
picture is readable in light and in dark.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dspark_batch.output.measures import Bin, Group, Pace

_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--grid)",
    "#040404": "var(--one)",
    "#050505": "var(--two)",
}
_INK, _MUTED, _GRID, _ONE, _TWO = _VARIABLES
_STYLE: dict[Any, object] = {  # matplotlib has a type with all names
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "dspark-batch",  # the same numbers give the same bytes
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": _MUTED,
    "lines.linewidth": 2,
}
_NEEDLESS = [
    re.compile(r"<metadata>.*?</metadata>", re.DOTALL),
    re.compile(r'(?<=<svg) xmlns:xlink="[^"]*"'),
    re.compile(r' xmlns="[^"]*"'),
    re.compile(r'(?<=<g) id="[^"]*"'),  # the same in every picture
    re.compile(r' (width|height)="[^"]*pt"'),
    re.compile(r"font-family: [^;\"]*; "),
]
_NARROW, _WIDE = 5.4, 11.0  # inches: half of the page, and all of it
_HEIGHT = 2.6
_LONGEST_LABEL = 24


class Chart:
    """One picture while it is drawn."""

    def __init__(self) -> None:
        self.svg = ""  # when it is done


@contextmanager
def _drawing(width: float = _NARROW, height: float = _HEIGHT) -> Iterator[tuple[Chart, Axes]]:
    """Give axes in our style to draw on; the chart has its SVG afterwards."""
    chart = Chart()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield chart, figure.subplots()
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    chart.svg = _inline(file.getvalue())


def _inline(svg: str) -> str:
    """Leave what a page needs: no prologue, no fixed size, colours from its variables."""
    svg = svg[svg.index("<svg") :]
    for needless in _NEEDLESS:
        svg = needless.sub("", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg


def throughput(pace: Pace) -> str:
    """Draw tokens per second over the time at work."""
    unit, seconds = _time_unit(pace.worked_s)
    edges = [i * pace.stretch_s / seconds for i in range(len(pace.tokens_per_s) + 1)]
    with _drawing(_WIDE) as (chart, axes):
        axes.stairs(pace.tokens_per_s, edges, fill=True, color=_ONE, alpha=0.25)
        axes.stairs(pace.tokens_per_s, edges, color=_ONE)
        for number, at in enumerate(pace.resumed_at_s):
            label = "resumed" if number == 0 else None
            axes.axvline(at / seconds, color=_TWO, linestyle="--", label=label)
        if pace.resumed_at_s:
            axes.legend(loc="upper right")
        axes.set(xlabel=f"time at work, {unit}", ylabel="tokens/s", xlim=(0, edges[-1]))
        axes.set_ylim(0, 1.15 * max(pace.tokens_per_s))  # the legend has a place of its own
    return chart.svg


def curve(steps: Sequence[int], values: Sequence[float], name: str) -> str:
    """Draw a number over the steps of a training."""
    with _drawing() as (chart, axes):
        axes.plot(steps, values, color=_ONE)
        axes.set(xlabel="step", ylabel=name)
    return chart.svg


def rates_by_position(now: Sequence[float], before: Sequence[float] | None) -> str:
    """Draw the share of rounds that kept a draft, by its position; and what it was before."""
    positions = range(1, len(now) + 1)
    with _drawing() as (chart, axes):
        axes.plot(positions, now, marker="o", color=_ONE, label="this drafter")
        if before is not None:
            axes.plot(range(1, len(before) + 1), before, marker="o", color=_TWO, label="before")
            axes.legend(loc="upper right")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel="position in the block", ylim=(0, 1.05), xticks=positions)
    return chart.svg


def tokens_per_round(rounds_by_accepted: Mapping[int, int]) -> str:
    """Draw how many rounds committed how many tokens."""
    tokens = range(1, max(rounds_by_accepted) + 2)
    whole = sum(rounds_by_accepted.values())
    with _drawing() as (chart, axes):
        axes.bar(tokens, [rounds_by_accepted.get(n - 1, 0) / whole for n in tokens], color=_ONE)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel="accepted drafts and the bonus", ylabel="rounds", xticks=tokens)
    return chart.svg


def accept_rate_by_position(reached: Mapping[int, int], accepted: Mapping[int, int]) -> str:
    """Draw how often a draft stays: given those before it, and at all."""
    positions = range(1, max(reached) + 2)
    with _drawing() as (chart, axes):
        given = [accepted.get(n - 1, 0) / reached[n - 1] for n in positions]
        at_all = [accepted.get(n - 1, 0) / reached[0] for n in positions]
        axes.plot(positions, given, marker="o", color=_ONE, label="if those before it stay")
        axes.plot(positions, at_all, marker="o", color=_TWO, label="of all rounds")
        axes.legend(loc="lower left")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel="position in the block", ylim=(0, 1.05), xticks=positions)
    return chart.svg


def calibration(bins: Sequence[Bin]) -> str:
    """Draw what the drafter says about its drafts against what became of them."""
    used = [each for each in bins if each.drafts]
    said = [each.confidence / each.drafts for each in used]
    with _drawing() as (chart, axes):
        axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=":", label="as said")
        axes.plot(said, [b.accepted / b.drafts for b in used], color=_ONE, zorder=2)
        most = max(each.drafts for each in used)
        sizes = [12 + 90 * each.drafts / most for each in used]
        axes.scatter(
            said,
            [b.accepted / b.drafts for b in used],
            s=sizes,
            color=_ONE,
            zorder=3,
            clip_on=False,
            label="measured (larger: more drafts)",
        )
        axes.legend(loc="upper left")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel="confidence", ylabel="accepted", xlim=(0, 1.02), ylim=(0, 1.05))
    return chart.svg


def lengths(tokens: Sequence[int], name: str) -> str:
    """Draw how long prompts or completions are."""
    with _drawing() as (chart, axes):
        axes.hist(tokens, bins=min(40, max(tokens) - min(tokens) + 1), color=_ONE)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.set(xlabel=f"{name} tokens", ylabel="items")
    return chart.svg


def accept_length_by(groups: Mapping[str, Group]) -> str:
    """Draw the accept length of each value of a column."""
    shown = {name: its for name, its in groups.items() if its.accept_length is not None}
    names = [_label(name, its) for name, its in shown.items()]
    lengths = [its.accept_length or 0.0 for its in shown.values()]
    with _drawing(_WIDE, 0.6 + 0.2 * len(names)) as (chart, axes):
        bars = axes.barh(range(len(names)), lengths, color=_ONE, height=0.7)
        axes.bar_label(bars, fmt="%.2f", padding=3, color=_MUTED)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(False)
        axes.margins(x=0.06, y=0.01)
        axes.set(xlabel="tokens per round")
    return chart.svg


def _label(name: str, its: Group) -> str:
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    # matplotlib would read a pair of $ as a formula.
    return f"{short} ({its.answers:,})".replace("$", r"\$")


def _time_unit(seconds: float) -> tuple[str, int]:
    """Choose a unit that gives numbers of one to three digits."""
    if seconds < 180:
        return "s", 1
    return ("min", 60) if seconds < 3 * 3600 else ("h", 3600)
