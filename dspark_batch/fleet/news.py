"""What a worker tells its driver, and what a driver may ask of a worker."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from dspark_batch.audit.replay import Against, Margin
from dspark_batch.errors import DsparkBatchError
from dspark_batch.types import Gauge, Outcome, Request, SetupJson


class Hello(NamedTuple):
    """Its pair is loaded."""

    name: str  # "host:gpu"
    slots: int
    context_length: int
    identity: Mapping[str, str | None]  # with `numerics`
    setup: SetupJson | None = None
    vocab_size: int = 1 << 31

    @property
    def ahead(self) -> int:
        """Requests that it may have at a time: those in slots, and enough to choose from."""
        return self.slots + self.slots // 2 + max(16, 2 * self.slots)


class Answers(NamedTuple):
    """Outcomes; the index of an item is the number of its request. "cancelled": it came back."""

    outcomes: Sequence[Outcome]
    gauge: Gauge | None = None


class Death(NamedTuple):
    """It is gone, or about to be."""

    why: str
    is_out_of_memory: bool = False


# An error of ours: the worker refuses to work, as one process would.
News: TypeAlias = Hello | Answers | Death | DsparkBatchError
Tell: TypeAlias = Callable[[News], None]


class Member(Protocol):
    """A worker, as a fleet knows it; only `margin` and `close` may wait."""

    def put(self, requests: Sequence[Request], against: Against | None) -> None:
        """Let requests wait there, for the engine, or for what `against` names."""
        ...

    def take_back(self, most: int) -> None:
        """Ask for requests that have not begun."""
        ...

    def margin(
        self, request: Request, answer: Sequence[int], tokens: tuple[int, int], against: Against
    ) -> Margin:
        """Ask how clear a choice of the target is."""
        ...

    def part(self) -> None:
        """Tell it that its end is near: it keeps what it learnt, and `close` waits for that."""
        ...

    def close(self) -> None:
        """End it; whatever it still tells is no news."""
        ...


# Begins a worker: its place in the team, most slots (None: its plan decides), whom it tells.
Spawn: TypeAlias = Callable[[int, int | None, Tell], Member]
