"""A team of fake workers that go on step by step, whenever their fleet waits for news."""

from collections import deque
from dataclasses import dataclass, field

from fakes import fake_answer

from dspark_batch.audit.replay import Margin
from dspark_batch.errors import ModelError
from dspark_batch.fleet.fleet import Fleet
from dspark_batch.fleet.news import Answers, Death, Hello
from dspark_batch.types import Failure, Gauge, Item, Request

_DEADLOCK = 2000  # steps without news
_TO_AND_FRO = 5000  # requests that one worker gets


@dataclass
class Worker:
    """Answers one active request in a step, in the order in which they came."""

    place: int
    tell: object
    slots: int = 2
    loads: int = 1  # steps until it has loaded
    every: int = 1  # steps between two answers
    dies_on: frozenset[str] = frozenset()  # custom_ids, when they are active
    dies_after: int | None = None  # answers; None: never
    refuses: str | None = None  # says this instead of hello
    numerics: str = "n0"
    out_of_memory: bool = False  # what it dies of
    sent: list[str] = field(default_factory=list)  # custom_ids that came
    most_held: int = 0
    is_closed: bool = False
    has_parted: bool = False

    def __post_init__(self):
        self.waiting, self.active = deque(), deque()
        self.age = self.answered = 0
        self.is_dead = False

    def put(self, requests, against):
        for request in requests:
            assert request.item.record == {}, "a worker has no use for records"
            self.waiting.append((request, against))
            self.sent.append(request.item.custom_id)
        assert len(self.sent) < _TO_AND_FRO, "requests come back for ever"
        self.most_held = max(self.most_held, len(self.waiting) + len(self.active))

    def take_back(self, most):
        back = [self.waiting.pop()[0] for _ in range(min(most, len(self.waiting)))]
        if back and not self.is_dead:
            cancelled = [Failure(r.item, "cancelled", f"{r.item.where}: given up") for r in back]
            self.tell(Answers(cancelled))

    def margin(self, request, answer, tokens, against):
        return Margin(0.5, 1.0)

    def part(self):
        self.has_parted = True

    def close(self):
        self.is_closed = True

    def die(self, why="killed"):
        if not self.is_dead:
            self.is_dead = True
            self.tell(Death(why, self.out_of_memory))

    def step(self):
        self.age += 1
        if self.is_dead or self.is_closed:
            return
        if self.age == self.loads:
            self.tell(ModelError(self.refuses) if self.refuses else self.hello())
        if self.age <= self.loads or self.age % self.every:
            return
        while self.waiting and len(self.active) < self.slots:
            self.active.append(self.waiting.popleft())
        ids = {request.item.custom_id for request, _ in self.active}
        if ids & self.dies_on or self.answered == self.dies_after:
            self.die("Unable to allocate" if self.out_of_memory else "killed")
        elif self.active:
            request, against = self.active.popleft()
            self.answered += 1
            answer = fake_answer(request)
            if against is not None:
                answer = answer._replace(text=f"{against}: {answer.text}")
            self.tell(Answers([answer], self.gauge()))

    def hello(self):
        identity = {"dtype": "float32", "numerics": self.numerics}
        return Hello(f"host:{self.place}", self.slots, 400, identity)

    def gauge(self):
        return Gauge(1.0, self.slots, 10, 20 + self.place, 2.0, 4.0, prompt_tokens=5)


class Inbox:
    """Lets the workers go on while the fleet waits; a fleet that waits for ever fails."""

    def __init__(self, team):
        self.team, self.news = team, deque()

    def put(self, news):
        self.news.append(news)

    def empty(self):
        return not self.news

    def get(self):
        for _ in range(_DEADLOCK):
            if self.news:
                return self.news.popleft()
            for worker in list(self.team.workers):
                worker.step()
        raise AssertionError("the fleet waits for news that never comes")


class Team:
    """Makes workers; `by_place` are settings for the first worker of a place, `later` for others.

    Args:
        num: places.
        by_place: settings of the first worker of each place that differs from `all`.
        later: settings of those that take the place of one that died.
        all_: settings of all workers.
    """

    def __init__(self, num, by_place=None, later=None, **all_):
        self.workers = []
        self.slots_asked = []  # of each that was begun
        self._by_place, self._later, self._all = by_place or {}, later or {}, all_
        self.fleet = Fleet(self.spawn, num)
        self.fleet._inbox = Inbox(self)
        self.lost = []
        self.fleet.on_lost = lambda worker, items: self.lost.append(
            (worker, sorted(item.custom_id for item in items))
        )
        for place in range(num):
            self.fleet.begin(place)

    def spawn(self, place, slots, tell):
        is_first = all(worker.place != place for worker in self.workers)
        own = self._by_place.get(place, {}) if is_first else self._later
        settings = self._all | own | ({"slots": slots} if slots else {})
        self.slots_asked.append(slots)
        self.workers.append(Worker(place, tell, **settings))
        return self.workers[-1]

    def at(self, place):
        """The workers that a place had, the first one first."""
        return [worker for worker in self.workers if worker.place == place]


def request(n, prefix=()):
    """A request whose prompt begins like others with the same prefix."""
    item = Item(n, f"q{n}", f"digest-{n}", f"in.jsonl:{n + 1}", {"prompt": n})
    return Request(item, (*prefix, n % 7 + 1, n + 1), 12)


def expected(n, prefix=()):
    return fake_answer(request(n, prefix)).text


def texts(outcomes):
    """Answers by custom_id; each one once."""
    found = {}
    for outcome in outcomes:
        assert outcome.item.custom_id not in found, "answered twice"
        is_failure = isinstance(outcome, Failure)
        found[outcome.item.custom_id] = outcome.code if is_failure else outcome.text
    return found
