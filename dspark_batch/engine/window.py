"""The look-ahead window: a few requests that are ready, and which of them go next."""

from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from dspark_batch.engine.prefix_cache import Chunks, PrefixCache, chunks_of
from dspark_batch.types import Item, Request


class Waiting(NamedTuple):
    """A request in the window."""

    request: Request
    is_urgent: bool
    arrival: int  # its number among all that came
    length: int  # tokens, if the answer is as long as it may be
    chunks: Chunks  # of its prompt


class Window:
    """Requests that wait for a slot.

    Urgent ones go first. Of the others, those with the same beginning go together, and so do those
    that share nothing; in a group long ones go first, since what runs side by side should be of a
    length; the group that came first goes first. Nobody waits for ever, except for urgent ones: a
    request that too many others have passed goes before all others. Neither it nor an urgent one
    lets anybody pass while it does not fit.

    Args:
        size: requests that are enough; `add` takes more.
        prefixes: told of every prompt; knows what prompts share.
    """

    def __init__(self, size: int, prefixes: PrefixCache) -> None:
        self._size = size
        self._patience = 4 * size  # departures
        self._prefixes = prefixes
        self._waiting: list[Waiting] = []
        self._is_ordered = True  # since the last one came
        self._arrivals = self._departures = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether one more would help to choose who goes together."""
        return len(self._waiting) < self._size

    @property
    def has_urgent(self) -> bool:
        """Whether somebody urgent waits."""
        return any(waiting.is_urgent for waiting in self._waiting)

    def add(self, request: Request, *, is_urgent: bool = False) -> None:
        """Let a request wait."""
        chunks = chunks_of(request.prompt_ids)
        self._prefixes.expect(chunks)
        length = len(request.prompt_ids) + request.max_tokens
        self._waiting.append(Waiting(request, is_urgent, self._arrivals, length, chunks))
        self._arrivals += 1
        self._is_ordered = False

    def take(self, most: int, fits: Callable[[Request], bool]) -> list[Waiting]:
        """Take out the next requests that fit, in the order in which they should run."""
        taken: list[Waiting] = []
        if not self._is_ordered:
            self._order()
        for waiting in self._waiting:
            if len(taken) == most:
                break
            if fits(waiting.request):
                taken.append(waiting)
            elif waiting.is_urgent or waiting.arrival < self._late:
                break
        arrivals = {waiting.arrival for waiting in taken}
        self._waiting = [w for w in self._waiting if w.arrival not in arrivals]
        self._departures += len(taken)
        return taken

    def cancel(self, item: Item) -> list[Request]:
        """Drop an item's requests; return them."""
        found = [w.request for w in self._waiting if w.request.item.is_same(item)]
        self._waiting = [w for w in self._waiting if not w.request.item.is_same(item)]
        return found

    def clear(self) -> None:
        """Drop what waits."""
        self._waiting = []

    @property
    def _late(self) -> int:
        """The arrivals before this one are impatient."""
        return self._departures - self._patience

    def _order(self) -> None:
        """Sort: the urgent, the impatient, then group by group, each from long to short."""
        groups: dict[int | None, list[Waiting]] = {}  # the last chunk that all of it share -> it
        for waiting in sorted(self._waiting, key=attrgetter("arrival")):
            num_shared = self._prefixes.num_shared(waiting.chunks)
            last = waiting.chunks[num_shared - 1] if num_shared else None
            groups.setdefault(last, []).append(waiting)
        for group in groups.values():
            group.sort(key=attrgetter("length"), reverse=True)
        self._waiting = list(chain.from_iterable(groups.values()))
        late = self._late
        self._waiting.sort(key=lambda waiting: (not waiting.is_urgent, waiting.arrival >= late))
        self._is_ordered = True
