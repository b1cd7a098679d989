"""A team of workers behind one `generate`; knows nothing of how a worker runs.

The unit is one request. A worker has a few more than it has slots, and never more than its fair
share of what is left. What was in flight in a worker that died goes to the others. All state is
here, in the thread that calls; workers only put news into the inbox.
"""

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from queue import SimpleQueue
from typing import TypeAlias

from dspark_batch.audit.replay import Against, Margin
from dspark_batch.errors import DsparkBatchError, ModelError, Resumable
from dspark_batch.fleet.news import Answers, Death, Hello, Member, News, Spawn
from dspark_batch.hub import CANCELLED
from dspark_batch.opening import Lost
from dspark_batch.record.attempts import MOST_CRASHES, SUSPICIOUS, poison
from dspark_batch.types import (
    Completion,
    Failure,
    Gauge,
    Item,
    Outcome,
    Request,
    WorkerJson,
)

log = logging.getLogger("dspark_batch")

# Says why a worker may not work for this job; None: it may.
Refuses: TypeAlias = Callable[[Hello], DsparkBatchError | None]

_MOST_DEATHS = 3  # of a place, without an answer in between
_GROUP = 8  # suspects that are tried together, before each is tried alone
_KEY_TOKENS = 64  # of a prompt, which name its beginning
_MOST_KEYS = 1 << 14
# For each worker, requests that are sent together, and outcomes handed over before more are sent.
_BURST = 64


def _always(item: Item) -> bool:
    """Let every item begin."""
    return True


def _not_told(worker: str, items: Sequence[Item]) -> None:
    """Keep no lesson."""


@dataclass(eq=False, slots=True)
class _Asked:
    """A request that has no outcome yet."""

    request: Request
    walk: "_Walk"
    number: int
    holder: "_Crew | None" = None  # None: it is here
    is_admitted: bool = False
    deaths: int = 0  # of workers in which it was in flight with others
    alone: int = 0  # of workers in which it was alone
    died_at: int | None = None  # the place of the last of them

    @property
    def is_suspect(self) -> bool:
        """Whether it goes to a worker that has nothing else."""
        return self.deaths + self.alone >= SUSPICIOUS

    @property
    def group(self) -> int:
        """With how many other suspects it may be tried, itself included."""
        return _GROUP if self.deaths == SUSPICIOUS and not self.alone else 1


@dataclass(eq=False, slots=True)
class _Crew:
    """A worker, from when it is begun until it is gone."""

    place: int
    member: Member = field(init=False)
    hello: Hello | None = None  # None: it still loads
    gauge: Gauge | None = None
    in_flight: dict[int, _Asked] = field(default_factory=dict)  # by number
    outbox: list[_Asked] = field(default_factory=list)
    is_asked_back: bool = False

    @property
    def ahead(self) -> int:
        """Requests that it may have at a time."""
        return 0 if self.hello is None else self.hello.ahead

    @property
    def slots(self) -> int:
        """How many of these decode."""
        return 1 if self.hello is None else self.hello.slots

    @property
    def is_apart(self) -> bool:
        """Whether it has suspects, and gets nothing else; with suspects are only suspects."""
        return any(asked.is_suspect for asked in islice(self.in_flight.values(), 1))


@dataclass(eq=False, slots=True)
class _Place:
    """A place in the team, and who had it."""

    crew: _Crew | None = None  # None: nobody has it any more
    name: str = ""
    slots: int = 0  # of its last worker
    rows: int = 0
    tokens: int = 0
    deaths: int = 0
    deaths_in_a_row: int = 0  # without an answer in between
    most_slots: int | None = None  # after it ran out of memory
    spent: list[Gauge] = field(default_factory=list)  # of those who are gone


class _Walk:
    """One walk through a stream."""

    def __init__(
        self,
        stream: Iterable[Request | Failure | None],
        may_begin: Callable[[Item], bool],
        against: Against | None = None,
    ) -> None:
        self.stream = iter(stream)
        self.may_begin = may_begin
        self.against = against
        self.goes_on = True  # False: nothing more may begin
        self.waiting: deque[_Asked] = deque()
        self.suspects: deque[_Asked] = deque()
        self.held: Counter[_Crew] = Counter()  # its requests there
        self.ended: deque[Outcome] = deque()  # to be handed over

    @property
    def num_held(self) -> int:
        """Count what is in flight."""
        return self.held.total()

    @property
    def size(self) -> int:
        """Count what has no outcome, without those that are kept apart."""
        return len(self.waiting) + self.num_held


class Fleet:
    """Answers streams with a team; is one of `opening.Generates`.

    Args:
        spawn: begins a worker, and does not wait for it.
        workers: places in the team.
        refuses: whether a worker that has loaded may not work for this job.

    Attributes:
        on_lost: is told of what was in flight in a worker that died.
    """

    def __init__(self, spawn: Spawn, workers: int, refuses: Refuses = lambda hello: None) -> None:
        self.on_lost: Lost = _not_told
        self.refuses = refuses
        self._spawn = spawn
        self._places = [_Place() for _ in range(workers)]
        self._inbox: SimpleQueue[tuple[_Crew | None, News]] = SimpleQueue()
        self._asked: dict[int, _Asked] = {}  # all that have no outcome, by number
        self._numbers = count()
        self._homes: OrderedDict[int, int] = OrderedDict()  # beginning of prompts -> place
        self._why = "no worker was ever there"  # the last one is gone

    # Who is there.

    def begin(self, place: int) -> None:
        """Begin a worker at a place; it works as soon as it has loaded."""
        crew = self._places[place].crew = _Crew(place)
        crew.member = self._spawn(place, self._places[place].most_slots, partial(self._tell, crew))

    def begin_all(self) -> None:
        """Begin a worker at each place that has none yet."""
        for number, place in enumerate(self._places):
            if place.crew is None:
                self.begin(number)

    def first(self) -> Hello:
        """Wait for any worker to have loaded.

        Raises:
            DsparkBatchError: none is left that may.
        """
        while not self._ready:
            self._hear()
        hello = self._ready[0].hello
        if hello is None:
            raise DsparkBatchError("a worker without a pair was ready; report this.")
        return hello

    def end(self, error: DsparkBatchError) -> None:
        """End what goes on, from any thread."""
        self._inbox.put((None, error))

    def _tell(self, crew: _Crew, news: News) -> None:
        """Take news, from any thread."""
        self._inbox.put((crew, news))

    def close(self) -> None:
        """End all workers; those that work keep what they learnt."""
        for crew in self._ready:
            crew.member.part()
        for place in self._places:
            if place.crew is not None:
                place.crew.member.close()
                place.crew = None

    @property
    def _crews(self) -> list[_Crew]:
        return [place.crew for place in self._places if place.crew is not None]

    @property
    def _ready(self) -> list[_Crew]:
        return [crew for crew in self._crews if crew.hello is not None]

    # What it does.

    def generate(
        self,
        stream: Iterable[Request | Failure | None],
        may_begin: Callable[[Item], bool] = _always,
    ) -> Iterator[Outcome]:
        """Answer a stream as `opening.Generates` has it.

        `may_begin` is asked when an item is handed to a worker for the first time, and about one
        that is there while nothing more comes. After a no, what has not begun there is taken back.

        Raises:
            DsparkBatchError: no worker is left.
        """
        return self._walked(_Walk(stream, may_begin))

    def replay(self, against: Against, stream: Iterable[Request | Failure]) -> Iterator[Outcome]:
        """Answer a stream by a baseline of the workers, for an audit."""
        return self._walked(_Walk(stream, _always, against))

    def margin(
        self, against: Against, request: Request, answer: Sequence[int], tokens: tuple[int, int]
    ) -> Margin:
        """Ask any worker how clear a choice of the target is."""
        self.first()
        return self._ready[0].member.margin(_bare(request, 0), answer, tokens, against)

    def _walked(self, walk: _Walk) -> Iterator[Outcome]:
        try:
            while True:
                yield from self._feed(walk)
                if walk.ended:
                    for _ in range(min(len(walk.ended), self._burst)):
                        yield walk.ended.popleft()
                elif walk.waiting or walk.suspects or walk.num_held:
                    self._even_out(walk)
                    self._hear()
                else:
                    return
        finally:
            self._forget(walk)

    def _feed(self, walk: _Walk) -> Iterator[Failure]:
        """Pull until there is as much as all workers may have, and hand it out."""
        room = self._room() - len(walk.suspects)
        while walk.goes_on and walk.size < room:
            pulled = next(walk.stream, None)
            if pulled is None:
                break
            if isinstance(pulled, Failure):
                yield pulled
                continue
            asked = _Asked(pulled, walk, next(self._numbers))
            self._asked[asked.number] = asked
            walk.waiting.append(asked)
            if len(walk.waiting) % self._burst == 0:
                self._hand_out(walk)
        self._hand_out(walk)

    @property
    def _burst(self) -> int:
        return _BURST * len(self._places)

    def _room(self) -> int:
        """Say how much all workers together may have; one that still loads is like another."""
        known = [crew.ahead for crew in self._ready]
        return sum(known) + (len(self._crews) - len(known)) * max(known, default=_BURST)

    def _hand_out(self, walk: _Walk) -> None:
        self._try_suspects(walk)
        share = -(-walk.size // max(1, len(self._crews)))
        crews = [crew for crew in self._ready if not crew.is_apart]
        while walk.waiting:
            crew = self._taker(walk, walk.waiting[0], crews, share)
            if crew is None:
                break
            if not self._admits(walk, walk.waiting[0]):
                break
            self._give(crew, walk.waiting.popleft())
        self._send()
        if walk.waiting and not walk.goes_on:
            self._withdraw(walk)

    def _admits(self, walk: _Walk, asked: _Asked) -> bool:
        """Ask whether an item may begin."""
        asked.is_admitted = asked.is_admitted or walk.may_begin(asked.request.item)
        walk.goes_on = asked.is_admitted
        return asked.is_admitted

    def _withdraw(self, walk: _Walk) -> None:
        """Drop what is with no worker."""
        for dropped in [*walk.waiting, *walk.suspects]:
            del self._asked[dropped.number]
        walk.waiting.clear()
        walk.suspects.clear()

    def _taker(
        self, walk: _Walk, asked: _Asked, crews: Sequence[_Crew], share: int
    ) -> _Crew | None:
        """Choose who gets a request: who has its beginning, unless others have far less to do.

        Who has it may get more than its share: where all have as much as they may, whoever has
        room next is seldom the one.
        """
        free = [crew for crew in crews if walk.held[crew] < min(share, crew.ahead)]
        if not free:
            return None
        emptiest = min(free, key=walk.held.__getitem__)
        key = _beginning(asked.request)
        if key is None:
            return emptiest
        home = next((crew for crew in crews if crew.place == self._homes.get(key)), None)
        if home is None:
            self._homes[key] = emptiest.place
            self._homes.move_to_end(key)
            if len(self._homes) > _MOST_KEYS:
                self._homes.popitem(last=False)
            return emptiest
        # Half a share, or what an idle worker is to have instead would go back and forth.
        too_many = max(1, min((home.ahead - home.slots) // 2, share // 2))
        return home if walk.held[home] - walk.held[emptiest] < too_many else emptiest

    def _try_suspects(self, walk: _Walk) -> None:
        """Give suspects to workers that have nothing else: a few, then each alone.

        Each goes to another place than the one it came from, if there is another: a place whose
        workers always die must not make an item look as if it had killed them.
        """
        for crew in self._ready:
            if not crew.in_flight:
                others = len(self._crews) > 1
                fit = [s for s in walk.suspects if not others or s.died_at != crew.place]
                most = fit[0].group if fit else 0
                for asked in [s for s in fit if s.group == most][:most]:
                    walk.suspects.remove(asked)
                    self._give(crew, asked)

    def _give(self, crew: _Crew, asked: _Asked) -> None:
        crew.in_flight[asked.number] = asked
        asked.holder = crew
        crew.outbox.append(asked)
        asked.walk.held[crew] += 1

    def _send(self) -> None:
        for crew in self._ready:
            outbox, crew.outbox = crew.outbox, []
            if outbox:  # all of it is of one walk: who hands out sends at once
                bare = [_bare(asked.request, asked.number) for asked in outbox]
                crew.member.put(bare, outbox[0].walk.against)

    def _even_out(self, walk: _Walk) -> None:
        """Take back what has not begun, if one worker has nothing to do and another has too much.

        Only where nothing waits: then this is the end of the stream. After a no, all is taken back.
        """
        if walk.waiting or walk.against is not None:
            return
        richest = max(self._ready, key=walk.held.__getitem__, default=None)
        last = next(reversed(richest.in_flight.values()), None) if richest else None
        if last is not None and last.walk is walk and walk.goes_on:
            walk.goes_on = walk.may_begin(last.request.item)
        if not walk.goes_on:
            for crew in self._ready:
                self._ask_back(crew, walk.held[crew])
            return
        has_idle = any(not crew.in_flight and not crew.is_apart for crew in self._ready)
        if has_idle and richest and walk.held[richest] > richest.slots and not richest.is_apart:
            self._ask_back(richest, walk.held[richest] // 2)

    def _ask_back(self, crew: _Crew, most: int) -> None:
        """Ask for what has not begun, once until there is an answer."""
        if most and not crew.is_asked_back:
            crew.is_asked_back = True
            crew.member.take_back(most)

    # What it hears.

    def _hear(self) -> None:
        """Wait for news, and take all that is there.

        Raises:
            DsparkBatchError: no worker is left, or something ended them all.
        """
        if not self._crews:
            raise ModelError(f"no worker is left: {self._why}")
        self._take(*self._inbox.get())
        while not self._inbox.empty():
            self._take(*self._inbox.get())

    def _take(self, crew: _Crew | None, news: News) -> None:
        if crew is None:
            if isinstance(news, DsparkBatchError):
                raise news
        elif isinstance(news, Answers):
            self._take_answers(crew, news)
        elif self._places[crew.place].crew is not crew:
            return  # it is gone, and nobody waits for it
        elif isinstance(news, Hello):
            self._welcome(crew, news)
        elif isinstance(news, Death):
            self._bury(crew, news)
        else:
            self._dismiss(crew, news)

    def _welcome(self, crew: _Crew, hello: Hello) -> None:
        place = self._places[crew.place]
        place.name, place.slots = hello.name, hello.slots
        problem = self.refuses(hello)
        if problem is None:
            crew.hello = hello
        else:
            self._dismiss(crew, problem)

    def _dismiss(self, crew: _Crew, error: DsparkBatchError) -> None:
        """Go on without a worker; who is the last one ends the job."""
        self._places[crew.place].crew = None
        crew.member.close()
        if not self._crews:
            raise error
        log.warning("%s The job goes on with the other workers.", error)

    def _take_answers(self, crew: _Crew, answers: Answers) -> None:
        place = self._places[crew.place]
        if answers.gauge is not None:
            crew.gauge = answers.gauge
        if answers.outcomes:
            crew.is_asked_back = False
        for outcome in answers.outcomes:
            asked = self._asked.get(outcome.item.index)
            if asked is None:
                continue  # it had an answer; this one is the second, and is the same
            if isinstance(outcome, Failure) and outcome.code == CANCELLED:
                self._come_back(crew, asked)
                continue
            self._finish(asked, outcome, place.name)
            place.rows += 1
            place.deaths_in_a_row = 0
            if isinstance(outcome, Completion):
                place.tokens += len(outcome.token_ids)

    def _finish(self, asked: _Asked, outcome: Outcome, worker: str | None = None) -> None:
        self._let_go(asked)
        del self._asked[asked.number]
        item = asked.request.item
        if isinstance(outcome, Completion):
            asked.walk.ended.append(outcome._replace(item=item, worker=worker))
        else:
            asked.walk.ended.append(outcome._replace(item=item))

    def _let_go(self, asked: _Asked) -> None:
        if asked.holder is not None:
            del asked.holder.in_flight[asked.number]
            asked.walk.held[asked.holder] -= 1
            asked.holder = None

    def _come_back(self, crew: _Crew, asked: _Asked) -> None:
        """Take back a request that has not begun."""
        if asked.holder is crew:
            self._let_go(asked)
            self._keep(asked)

    def _keep(self, asked: _Asked) -> None:
        """Let a request go before all others, if anything may begin."""
        walk = asked.walk
        if walk.goes_on:
            (walk.suspects if asked.is_suspect else walk.waiting).appendleft(asked)
        else:
            del self._asked[asked.number]

    def _bury(self, crew: _Crew, death: Death) -> None:
        """Give what was in flight to others, and begin another worker in this place."""
        place = self._places[crew.place]
        name = place.name or f"worker {crew.place + 1}"
        place.crew = None
        place.deaths += 1
        crew.member.close()
        if crew.gauge is not None:
            place.spent.append(crew.gauge)
        lost = list(crew.in_flight.values())
        self._why = f"{name} died ({death.why})."
        if death.is_out_of_memory and crew.slots > 1:
            place.most_slots = crew.slots // 2
        else:
            self._suspect(name, lost)
            place.deaths_in_a_row += 1
        for asked in reversed(lost):
            self._let_go(asked)
            asked.died_at = crew.place
            if asked.alone >= MOST_CRASHES:
                self._finish(asked, poison(asked.request.item, "workers"))
            else:
                self._keep(asked)
        self._replace(crew.place)

    def _suspect(self, worker: str, lost: Sequence[_Asked]) -> None:
        """Note that a worker died with these in flight."""
        for asked in lost:
            if len(lost) == 1:
                asked.alone += 1
            else:
                asked.deaths += 1
        if lost:
            self.on_lost(worker, [asked.request.item for asked in lost])

    def _replace(self, number: int) -> None:
        """Begin another worker, unless those at this place die and do nothing else."""
        place = self._places[number]
        if place.deaths_in_a_row > _MOST_DEATHS:
            log.warning(
                "%s It died %d times without an answer in between, so nobody takes its place.",
                *(self._why, place.deaths_in_a_row),
            )
            if not self._crews:
                raise Resumable(
                    f"{self._why} No worker is left. The finished rows are safe; the same command "
                    "continues."
                )
            return
        log.warning("%s Another one begins in its place.", self._why)
        self.begin(number)

    def _forget(self, walk: _Walk) -> None:
        """Let nothing of a walk come out any more, if it was left before its end."""
        for asked in [asked for asked in self._asked.values() if asked.walk is walk]:
            self._let_go(asked)
            del self._asked[asked.number]

    # What it tells.

    def gauge(self) -> Gauge | None:
        """Tell how full all workers are, and what they have spent on the mean; None: unknown."""
        there = [crew.gauge for crew in self._crews if crew.gauge is not None]
        gone = [gauge for place in self._places for gauge in place.spent]
        if not there and not gone:
            return None
        return replace(_merged(there, gone, len(self._places)), workers=self._told())

    def _told(self) -> tuple[WorkerJson, ...]:
        return tuple(
            {
                "name": place.name or f"worker {number}",
                "slots": place.slots,
                "rows": place.rows,
                "tokens": place.tokens,
                "deaths": place.deaths,
            }
            for number, place in enumerate(self._places, 1)
        )


def _beginning(request: Request) -> int | None:
    """Name the beginning of a prompt; None: it is too short to be worth it."""
    ids = request.prompt_ids[:_KEY_TOKENS]
    return hash(ids) if len(ids) == _KEY_TOKENS else None


def _bare(request: Request, number: int) -> Request:
    """Leave out what a worker need not know, and name a request by its number."""
    return replace(request, item=request.item._replace(index=number, record={}))


def _merged(there: Sequence[Gauge], gone: Sequence[Gauge], workers: int) -> Gauge:
    """Add gauges up; seconds are a mean over the workers, so that shares of a second stay shares.

    Args:
        there: of those who work now.
        gone: of those who did.
        workers: places in the team.
    """
    every = [*there, *gone]
    idle = [gauge.idle_s for gauge in every if gauge.idle_s is not None]
    return Gauge(
        busy_slots=sum(gauge.busy_slots for gauge in there),
        slots=sum(gauge.slots for gauge in there),
        memory_bytes=sum(gauge.memory_bytes for gauge in there),
        peak_memory_bytes=max(gauge.peak_memory_bytes for gauge in every),
        prefill_s=sum(gauge.prefill_s for gauge in every) / workers,
        round_s=sum(gauge.round_s for gauge in every) / workers,
        idle_s=sum(idle) / workers if idle else None,
        prompt_tokens=sum(gauge.prompt_tokens for gauge in every),
        sampled_rounds=sum(gauge.sampled_rounds for gauge in every),
        sampled_draft_s=sum(gauge.sampled_draft_s for gauge in every),
        sampled_verify_s=sum(gauge.sampled_verify_s for gauge in every),
    )
