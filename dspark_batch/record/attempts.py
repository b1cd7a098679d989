"""What was admitted: known after any crash, because it is on the disk before it is generated.

`attempts.jsonl` is a log of five events, and only what follows the last `start` is read:

    {"start": {"rows": 512, "suspects": []}}    rows: bytes of the journal at that time
    {"admitted": {"index": 7, "custom_id": "q-7", "digest": "…"}}
    {"lost": {"worker": "host:0", "items": [[7, "…"]]}}    in flight in a worker that died
    {"out_of_memory": {"slots": 8}}
    {"stopped": {}}                             in good order; without it, the start crashed

The items of a fleet are in flight in its workers, so no crash of ours is their doing. Such a start
notes what its workers lost, and nobody as admitted.

It decides nothing about what is finished; without it, a crash only teaches less.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson

from dspark_batch.errors import DsparkBatchError, Resumable, is_out_of_memory
from dspark_batch.record.disk import AppendLog
from dspark_batch.types import Failure, Item

MOST_CRASHES = 3  # of an item that is alone in flight, before it is given up
SUSPICIOUS = 2  # deaths of workers with an item in flight, from which on it is kept apart


class Event(NamedTuple):
    """One line."""

    end: int  # just after its newline
    name: str
    fields: Mapping[str, Any]  # what they are follows from the name


@dataclass(frozen=True, slots=True)
class Suspect:
    """An item that was in flight when a start crashed without finishing any, or alone."""

    index: int
    digest: str
    crashes: int = 0  # of starts in which it was alone in flight

    def is_(self, item: Item) -> bool:
        """Whether this is still the record at that index."""
        return (self.index, self.digest) == (item.index, item.digest)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the last start teaches this one."""

    suspects: tuple[Suspect, ...] = ()  # to run one at a time, before all others
    slots: int | None = None  # most slots that may fit into the memory; None: nobody knows

    def suspect_of(self, item: Item) -> Suspect | None:
        """Find an item among the suspects."""
        return next((suspect for suspect in self.suspects if suspect.is_(item)), None)


def lesson(path: Path, rows: int, is_to_do: Callable[[int], bool]) -> Lesson:
    """Learn from the attempts of the last start.

    Args:
        path: of `attempts.jsonl`; it need not exist.
        rows: bytes of the journal now.
        is_to_do: tells whether the record at an index has no row.
    """
    last = _LastStart()
    for event in _events(path):
        last.add(event, is_to_do)
    return Lesson(last.suspects(rows, is_to_do), last.slots)


def poison(item: Item, what: str = "starts") -> Failure:
    """Give an item up, so that it cannot stop the others for ever; `what` is what it crashed."""
    return Failure(
        item,
        "poison",
        f"{item.where}: {MOST_CRASHES} {what} crashed while this item was alone in flight. Find "
        "out what it does to them, and run it again with --retry-failed.",
    )


class Attempts:
    """The log of one start; a context that tells a crash from an orderly end."""

    def __init__(
        self,
        path: Path,
        rows: int,
        learnt: Lesson,
        *,
        slots: int = 1,
        fsync_every: int = 1,
        is_fleet: bool = False,
    ) -> None:
        """Begin a start.

        Args:
            path: of the file.
            rows: bytes of the journal now.
            learnt: from the start before.
            slots: of this start.
            fsync_every: admissions that a power cut may take.
            is_fleet: items are in flight in other processes.
        """
        self._is_fleet = is_fleet
        self._slots = slots
        whole = max((event.end for event in _events(path)), default=0)
        self._log = AppendLog(path, whole, fsync_every=fsync_every)
        suspects = [asdict(suspect) for suspect in learnt.suspects]
        start = {"rows": rows, "suspects": suspects, "slots": learnt.slots}
        self._write("start", start | ({"is_fleet": True} if is_fleet else {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None and is_out_of_memory(error):
                self._write("out_of_memory", {"slots": self._slots})
                raise Resumable(
                    f"out of memory with slots {self._slots} ({error}). The finished rows are "
                    "safe; the same command continues, with fewer slots where there are more "
                    "than one."
                ) from error
            if kind is None or issubclass(kind, (KeyboardInterrupt, DsparkBatchError)):
                self._write("stopped", {})
        finally:
            self._log.close()

    def admit(self, item: Item) -> None:
        """Write down that an item is about to be generated.

        Raises:
            Resumable: the disk refused it.
        """
        if not self._is_fleet:
            names = {"index": item.index, "custom_id": item.custom_id, "digest": item.digest}
            self._write("admitted", names)

    def lose(self, worker: str, items: Sequence[Item]) -> None:
        """Write down what was in flight in a worker that died.

        Raises:
            Resumable: the disk refused it.
        """
        self._write("lost", {"worker": worker, "items": [[i.index, i.digest] for i in items]})

    def _write(self, name: str, fields: Mapping[str, object]) -> None:
        self._log.append(orjson.dumps({name: fields}, option=orjson.OPT_APPEND_NEWLINE))


class _LastStart:
    """The events since the last `start`, of which only unfinished items are remembered."""

    def __init__(self) -> None:
        self.slots: int | None = None
        self._known: list[Suspect] = []
        self._rows = 0
        self._in_flight: list[Suspect] = []
        self._lost: Counter[Suspect] = Counter()  # -> workers that died with it in flight
        self._alone: Counter[Suspect] = Counter()  # -> of these, those in which it was alone
        self._has_crashed = False

    def add(self, event: Event, is_to_do: Callable[[int], bool]) -> None:
        name, fields = event.name, event.fields
        if name == "start":
            self._known = [Suspect(**each) for each in fields["suspects"]]
            self._rows, self.slots = fields["rows"], fields["slots"]
            self._in_flight, self._has_crashed = [], not fields.get("is_fleet")
            self._lost, self._alone = Counter(), Counter()
        elif name == "lost":
            lost = [Suspect(*item) for item in fields["items"]]
            self._lost.update(lost)
            self._alone.update(lost if len(lost) == 1 else ())
        elif name == "admitted" and is_to_do(fields["index"]):
            self._in_flight.append(Suspect(fields["index"], fields["digest"]))
        elif name == "out_of_memory":
            self.slots = max(1, fields["slots"] // 2)
        elif name == "stopped":
            self._has_crashed = False

    def suspects(self, rows: int, is_to_do: Callable[[int], bool]) -> tuple[Suspect, ...]:
        if not self._has_crashed:  # those that were given up have had their row
            open_cases = [s for s in self._known if s.crashes < MOST_CRASHES]
            by_index = {s.index: s for s in [*open_cases, *self._kept_apart()]}
            return tuple(s for s in by_index.values() if is_to_do(s.index))
        if len(self._in_flight) == 1:
            [alone] = self._in_flight
            before = sum(s.crashes for s in self._known if s.index == alone.index)
            return (replace(alone, crashes=before + 1),)
        return tuple(self._in_flight) if rows == self._rows else ()

    def _kept_apart(self) -> list[Suspect]:
        """List the items that more than one worker has died with."""
        before = {known.index: known.crashes for known in self._known}
        found = [suspect for suspect, deaths in self._lost.items() if deaths >= SUSPICIOUS]
        return [replace(s, crashes=self._alone[s] + before.get(s.index, 0)) for s in found]


def _events(path: Path) -> Iterator[Event]:
    """Yield the events up to the first line that a crash has torn."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as stream:
        for line in stream:
            end += len(line)
            try:
                [(name, fields)] = orjson.loads(line).items()
            except (orjson.JSONDecodeError, AttributeError, ValueError):
                return
            if line.endswith(b"\n"):
                yield Event(end, name, fields)
