"""The scheduler: which requests go next, and their way into the slots.

A window holds requests that are ready. Their prompts are computed in waves, some of them ahead of
need.
"""

from collections.abc import Callable, Generator
from collections.abc import Sequence as ListLike
from itertools import chain, takewhile
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

from dspark_batch.answers.sampling import rule_of, scores_of
from dspark_batch.answers.sequence import Score, Sequence
from dspark_batch.caches.prefix_cache import CHUNK, Chunks, PrefixCache, chunks_of
from dspark_batch.engine.clock import Clock
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import Prefilled, Prompt, prefill
from dspark_batch.engine.shapes import Shapes, common_len
from dspark_batch.engine.slots import Slots
from dspark_batch.numerics.rules import Scored
from dspark_batch.numerics.sampling import are_finite
from dspark_batch.numerics.scores import Scores
from dspark_batch.tuning.pace import Step
from dspark_batch.types import Item, Request, SamplingRule

MayBegin: TypeAlias = Callable[[Item], bool]

_PROMPT_TOKENS = 2048  # of prompts that may hold up a round
_SEATING_SHARE = 16  # slots per free one that, for a round, costs what seating does (an H100)
_LEAST_WINDOW = 16  # requests that wait, so that prompts with the same beginning meet


class Waiting(NamedTuple):
    """A request in the window."""

    request: Request
    is_urgent: bool
    arrival: int  # its number among all that came
    tokens: int  # that go through the target before it decodes
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
        tokens, given = len(request.prompt_ids), request.given
        length = tokens + request.max_tokens
        tokens += max(0, len(given.token_ids) - 1) if given else 0
        self._waiting.append(Waiting(request, is_urgent, self._arrivals, tokens, length, chunks))
        self._arrivals += 1
        self._is_ordered = False

    def take(self, most: int, fits: Callable[[Request], bool]) -> list[Waiting]:
        """Take out the next requests that fit, in the order in which they should run."""
        taken: list[Waiting] = []
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

    def lengths(self, most: int) -> list[int]:
        """Count the prompt tokens of the next requests that no other prompt shares."""
        self._order()
        return [
            max(1, w.tokens - CHUNK * self._prefixes.num_shared(w.chunks))
            for w in self._waiting[:most]
        ]

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
        if self._is_ordered:
            return
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


class _Wave(NamedTuple):
    """Sequences whose prompts are through."""

    filled: Prefilled
    sequences: list[tuple[int, Sequence]]  # with their slots in `filled`
    first: mx.array  # [P] int32, the first tokens of the answers, by slot
    finite: mx.array  # [P] bool, were they chosen from numbers?
    scores: Scores | None  # of the first tokens, [P, 1]; None: nobody asked

    @property
    def is_urgent(self) -> bool:
        """Whether it goes before others; those who wait for slots are parted by it."""
        return any(sequence.is_urgent for _, sequence in self.sequences)

    def told(self) -> list[list[Score]]:
        """Bring what prefill scored to the host, by sequence."""
        by_prompt = self.filled.scores()
        return [by_prompt[n] for n, _ in self.sequences]

    def without(self, item: Item) -> "_Wave":
        """Leave an item out."""
        kept = [(n, s) for n, s in self.sequences if not s.request.item.is_same(item)]
        return self._replace(sequences=kept)


class Scheduler:
    """Brings requests into slots.

    A pass over many prompts costs little more than one over a few, so waves are large, and some
    sequences wait with their prompts computed for a slot: half as many as there are slots. The
    host reads first tokens a round later, when the device has long been through with them; an
    answer that ends there never takes a slot.

    Args:
        passes: of the pair.
        shapes: those that may run.
        slots: where sequences go.
        most_slots: that may be taken.
        most_positions: that all caches may hold; None for any number. A request that alone
            needs more runs alone.
        prefixes: the shared beginnings.
        sampling: how requests with a temperature are drawn.
        sequence: makes an answer that has not begun.
        begin: takes a first token, whether it was chosen from numbers, and its score if that was
            asked for; tells whether more are to come.
        clock: told of prompts.
        step: whether the drafter keeps its context just now.
        sits_behind: whether some can sit down behind a round that nobody has read.
        commit_all: commits all rounds that the device has, before others sit down.

    Attributes:
        window: the requests that come next.
    """

    def __init__(  # noqa: PLR0913  what it connects
        self,
        passes: Passes,
        shapes: Shapes,
        slots: Slots,
        *,
        most_slots: int,
        most_positions: int | None,
        prefixes: PrefixCache,
        sampling: SamplingRule,
        sequence: Callable[[Waiting], Sequence],
        begin: Callable[[Sequence, int, bool, ListLike[Score]], bool],
        clock: Clock,
        step: Callable[[], Step],
        sits_behind: Callable[[ListLike[Sequence]], bool],
        commit_all: Callable[[], None],
    ) -> None:
        self.window = Window(max(_LEAST_WINDOW, 2 * most_slots), prefixes)
        self._passes = passes
        self._shapes = shapes
        self._slots = slots
        self._most_slots = most_slots
        self._most_ahead = most_slots // 2
        self._most_positions = most_positions
        self._prefixes = prefixes
        self._sampling = sampling
        self._sequence = sequence
        self._begin = begin
        self._clock = clock
        self._step = step
        self._sits_behind = sits_behind
        self._commit_all = commit_all
        self._begun: list[Sequence] = []  # their prompts are on their way through the target
        self._filling: Generator[None, None, Prefilled] | None = None  # of those
        self._through: list[_Wave] = []  # first tokens not read yet
        self._ready: list[_Wave] = []  # wait for slots
        self._num_unused = 0  # slots that they could have had, summed over rounds

    @property
    def is_idle(self) -> bool:
        """Whether nobody is on the way from the window to a slot."""
        return not (self._begun or self._through or self._ready)

    @property
    def num_waiting(self) -> int:
        """Count those who came and have no slot yet."""
        return len(self.window) + len(self._begun) + _num(self._through + self._ready)

    def run(self, may_begin: MayBegin) -> bool:
        """Seat who is ready, and send the next prompts to the device.

        Returns whether more may begin; if not, what waited in the window is dropped.
        """
        self._read()
        self._seat()
        num_tokens, goes_on = 0, True
        while goes_on and num_tokens < _PROMPT_TOKENS:
            if not self._begun:
                goes_on = self._begin_wave(may_begin)
            if self._filling is None:
                break
            num_tokens += sum(len(Prompt.of(sequence.request).ids) for sequence in self._begun)
            self._clock.add_prompts()
            try:
                next(self._filling)  # one pass; if there are more, rounds go on behind it
            except StopIteration as through:
                self._end_wave(through.value)
        return goes_on

    def find(self, item: Item) -> list[Sequence]:
        """Find an item's sequences on their way to a slot."""
        there = [s for wave in self._through + self._ready for _, s in wave.sequences]
        on_the_way = [s for s in self._begun if not s.is_cancelled] + there
        return [s for s in on_the_way if s.request.item.is_same(item)]

    def cancel(self, item: Item) -> list[Request]:
        """Give up an item that has no slot; return its requests."""
        found = self.find(item)
        for sequence in found:
            sequence.is_cancelled = True
        if self._begun and all(sequence.is_cancelled for sequence in self._begun):
            self._begun, self._filling = [], None
        self._through = [wave.without(item) for wave in self._through]  # read all the same
        without = [wave.without(item) for wave in self._ready]
        self._ready = [wave for wave in without if wave.sequences]
        return self.window.cancel(item) + [sequence.request for sequence in found]

    def _read(self) -> None:
        """Read first tokens; waits for the device if it is not through."""
        waves, self._through = self._through, []
        for wave in waves:
            self._clock.prompt_tokens += wave.filled.num_computed
            read: list[Any] = [wave.first.tolist(), wave.finite.tolist()]
            (first, finite), scores = read, scores_of(wave.scores)
            for (_, sequence), told in zip(wave.sequences, wave.told(), strict=True):
                sequence.told = told
            stay = [
                (n, s)
                for n, s in wave.sequences
                if self._begin(s, first[n], finite[n], scores[n] if scores else ())
            ]
            for is_urgent in (True, False):
                part = [(n, s) for n, s in stay if s.is_urgent == is_urgent]
                if part:
                    self._ready.append(wave._replace(sequences=part))
        self._ready.sort(key=lambda wave: not wave.is_urgent)  # and who came first

    def _seat(self) -> None:
        """Give free slots to those who are ready: at once to those who move nobody.

        For others the device waits, so once it has cost as much to leave the slots free.
        """
        while (some := self._next_to_seat) and self._sits_behind([s for _, s in some]):
            self._seat_some()
        self._num_unused += self._num_to_seat
        if not self._next_to_seat:
            return
        is_worth_it = self._num_unused >= self._most_slots // _SEATING_SHARE
        if self._slots.active and not is_worth_it and not self._ready[0].is_urgent:
            return
        self._num_unused = 0
        self._commit_all()
        ready = [sequence for wave in self._ready for _, sequence in wave.sequences]
        self._slots.make_room_for(ready[: self._num_to_seat])
        while self._next_to_seat:
            self._seat_some()

    def _seat_some(self) -> None:
        """Seat those of the first wave for whom there is a slot."""
        some, wave = self._next_to_seat, self._ready.pop(0)
        self._slots.enter([s for _, s in some], wave.filled, [n for n, _ in some])
        if later := wave.sequences[len(some) :]:
            self._ready.insert(0, wave._replace(sequences=later))

    @property
    def _next_to_seat(self) -> list[tuple[int, Sequence]]:
        """Those of the first wave for whom there is a slot."""
        return self._ready[0].sequences[: self._num_to_seat] if self._ready else []

    @property
    def _num_to_seat(self) -> int:
        """Those who are ready and for whom there is a slot."""
        return min(self._most_slots - len(self._slots.active), _num(self._ready))

    def _begin_wave(self, may_begin: MayBegin) -> bool:
        """Take the next requests from the window, if they are worth a pass."""
        waiting = _num(self._through + self._ready)
        most = self._most_slots + self._most_ahead - len(self._slots.active) - waiting
        most = min(most, self._shapes.most_prompts)
        least = 1 if self.window.has_urgent else max(1, self._most_ahead // 2)
        if most < min(least, self._shapes.most_prompts, len(self.window)):
            return True
        most = self._shapes.num_together(self.window.lengths(most))
        taken = self.window.take(most, self._fits()) if most else []
        begun = list(takewhile(lambda waiting: may_begin(waiting.request.item), taken))
        if begun:
            self._begun = [self._sequence(waiting) for waiting in begun]
            prompts = [Prompt.of(waiting.request) for waiting in begun]
            is_asked = self._step().keeps_context
            self._filling = prefill(
                self._passes, self._shapes, prompts, self._prefixes, with_context=is_asked
            )
        if len(begun) < len(taken):
            self.window.clear()
        return len(begun) == len(taken)

    def _end_wave(self, filled: Prefilled) -> None:
        count = len(self._begun)
        rule = rule_of(self._sampling, self._begun, lambda: mx.zeros(count, dtype=mx.int32))
        first, finite = rule.first(filled.logits), are_finite(filled.logits)
        scores = rule.scores if isinstance(rule, Scored) else None
        mx.async_eval(first, finite, *(scores or ()))
        for sequence, num_cached in zip(self._begun, filled.cached, strict=True):
            sequence.num_cached = num_cached
            sequence.fallback = filled.fallback
            sequence.has_context = filled.has_context
        wanted = [(n, s) for n, s in enumerate(self._begun) if not s.is_cancelled]
        self._through.append(_Wave(filled, wanted, first, finite, scores))
        self._begun, self._filling = [], None

    def _fits(self) -> Callable[[Request], bool]:
        """Make what tells whether one more request fits beside those that it was told of."""
        limit, active = self._most_positions, self._slots.active
        if limit is None:
            return lambda request: True
        waiting = [s for wave in self._through + self._ready for _, s in wave.sequences]
        planned = [sequence.request for sequence in active + waiting]

        shared = common_len([request.prompt_ids for request in planned])

        def positions(shared: int) -> int:
            prompts = sum(len(request.prompt_ids) for request in planned[len(active) :])
            return prompts + self._slots.num_positions(planned, self._most_slots, shared)

        def fits(request: Request) -> bool:
            nonlocal shared
            is_alone = not planned
            planned.append(request)
            less = common_len([planned[0].prompt_ids, request.prompt_ids])
            less = less if is_alone else min(less, shared)
            if is_alone or positions(less) <= limit:
                shared = less
                return True
            planned.pop()
            return False

        return fits


def _num(waves: list[_Wave]) -> int:
    return sum(len(wave.sequences) for wave in waves)
