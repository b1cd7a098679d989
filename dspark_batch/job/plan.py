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
    widths_by_size: dict[int, list[int]] = {}
    for size, width in sorted(map(tuple, shapes)):
        widths_by_size.setdefault(size, []).append(width)
    sizes_by_widths: dict[tuple[int, ...], list[int]] = {}
    for size, widths in widths_by_size.items():
        sizes_by_widths.setdefault(tuple(widths), []).append(size)
    return ", ".join(
        f"{_or(sizes)} {noun}{'s' * (sizes != [1])} by {_or(widths)} token{'s' * (widths != (1,))}"
        for widths, sizes in sizes_by_widths.items()
    )


def _or(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
