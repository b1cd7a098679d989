"""Draws the step curve of a machine: what a target pass costs by width, for each number of slots.

    python -m benchmarks.step_curve [--machine FILE] [--title TEXT] [-o step_curve.svg]

FILE holds what `Machine.to_json` gives; without one the bundled pair is measured here. Costs are
relative to one token of one slot. Filled: in the shape class. Hollow: other bits. Prints one JSON
line with the machine.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.common import print_line, surroundings
from dspark_batch.engine.machine import Machine
from dspark_batch.engine.setup import set_up
from dspark_batch.models.load import load_pair


def curves(machine):
    """List (width, cost, is in the class) by number of slots; the cost of (1, 1) is 1."""
    passes = [(each, True) for each in machine.target] + [(each, False) for each in machine.others]
    one = next(each.seconds for each, _ in passes if (each.slots, each.width) == (1, 1))
    points_by_slots = {}
    for each, is_member in sorted(passes):
        point = (each.width, each.seconds / one, is_member)
        points_by_slots.setdefault(each.slots, []).append(point)
    return points_by_slots


def draw(machine, title):
    """Draw the curves, one line for each number of slots."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    found = curves(machine)
    colours = mpl.colormaps["viridis"].resampled(len(found) + 1)
    for number, (slots, points) in enumerate(found.items()):
        colour = colours(number)
        widths, costs, _ = zip(*points, strict=True)
        label = f"{slots} slot{'s' * (slots > 1)}"
        axes.plot(widths, costs, color=colour, linewidth=1.2, zorder=1)
        axes.plot([], [], "o-", color=colour, label=label)  # the legend's line is always filled
        for width, cost, is_member in points:
            face = colour if is_member else "white"
            axes.plot(width, cost, "o", color=colour, markerfacecolor=face, zorder=2)
    _label(axes, sorted({width for points in found.values() for width, *_ in points}))
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def _label(axes, widths):
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    axes.set_xlabel("width: tokens of each slot in one target pass")
    axes.set_ylabel("time of the pass,\nrelative to one token of one slot")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def main():
    """Draw, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", type=Path, help="JSON; default: measure the bundled pair here")
    parser.add_argument("--title", default="filled: in the shape class; hollow: other bits")
    parser.add_argument("-o", "--out", type=Path, default=Path("step_curve.svg"))
    options = parser.parse_args()
    if options.machine:
        machine = Machine.from_json(json.loads(options.machine.read_text()))
        where = {}
    else:
        machine = set_up(load_pair(dtype="float32")).machine
        where = surroundings()
    mpl.rcParams.update({"svg.hashsalt": "dspark-batch", "svg.fonttype": "none"})
    draw(machine, options.title).savefig(options.out, metadata={"Date": None})
    print_line({"benchmark": "step_curve", **where, "machine": machine.to_json()})


if __name__ == "__main__":
    main()
