"""How a job is decoded on its machine: what reports and people are told of the set-up."""

from collections.abc import Mapping, Sequence

from dspark_batch.types import Json


def plan_of(setup: Mapping[str, Json] | None) -> dict[str, Json] | None:
    """Take the plan out of a set-up, as the manifest has it; None: there is no set-up."""
    if setup is None:
        return None
    return {
        "mode": setup["mode"],
        **setup["plan"],
        "shape_class": _class_text(setup["machine"]["shapes"])
        if setup["mode"] == "exact"
        else "none: any pass may run",
    }


def _class_text(shapes: Mapping[str, Json]) -> str:
    rounds = _shapes_text(shapes["steps"], "slot")
    prompts = _shapes_text(shapes["prefill"], "prompt")
    return f"rounds: {rounds}; prefill: {prompts}"


def _shapes_text(shapes: Sequence[tuple[int, int]], noun: str) -> str:
    """Say which passes there are; those with the same widths in one breath."""
    widths_by_rows: dict[int, list[int]] = {}
    for rows, width in sorted(map(tuple, shapes)):
        widths_by_rows.setdefault(rows, []).append(width)
    rows_by_widths: dict[tuple[int, ...], list[int]] = {}
    for rows, widths in widths_by_rows.items():
        rows_by_widths.setdefault(tuple(widths), []).append(rows)
    return ", ".join(
        f"{_or(rows)} {noun}{'s' * (rows != [1])} by {_or(widths)} token{'s' * (widths != (1,))}"
        for widths, rows in rows_by_widths.items()
    )


def _or(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
