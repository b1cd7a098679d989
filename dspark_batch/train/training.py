"""The values of a training that others read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

Point: TypeAlias = dict[str, Any]  # a step, and the mean of each term of the loss since the last
# Group, "all" among them -> what `measure` says of it.
Reports: TypeAlias = dict[str, dict[str, Any]]


class Lesson(NamedTuple):
    """How far a training is."""

    doing: str
    step: int = 0
    steps: int = 0  # in all; 0: not known yet
    curve: Sequence[Point] = ()  # earlier starts included


Observe = Callable[[Lesson], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the options say; None: a rule decides."""

    kind: str | None = None  # "dspark" or "dflash"
    layers: int | None = None
    block: int | None = None  # tokens that one pass drafts
    taps: tuple[int, ...] | None = None  # layers of the target whose outputs the drafter reads
    rank: int | None = None  # of the Markov head; 0: none
    steps: int | None = None
    seed: int = 0  # of the weights, the order and the anchors
    init: str | None = None  # a drafter to go on with; None: a new one
    by: str | None = None  # an input column whose values are measured apart

    @property
    def sizes(self) -> dict[str, object]:
        """List what was asked of a new drafter."""
        names = ("kind", "layers", "block", "taps", "rank")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What came out."""

    to: str  # name of the drafter's directory
    about: dict[str, Any]  # sizes, steps, seed, rate
    answers: int  # that it learnt from
    held_out: int  # that it was measured on
    left_out: dict[str, int]  # rows, by why
    before: Reports | None  # of the drafter it began with; None: it began with a new one
    after: Reports
    curve: list[Point] = field(default_factory=list)
