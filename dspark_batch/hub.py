"""The one thread of a process that owns MLX; what jobs and people ask goes through it.

MLX's streams belong to the thread that made them. So this thread loads the pair and decodes, and
others put requests into it, and are called back:

    hub = Hub(lambda: open_pair(spec, None))
    ticket = hub.put(request, print, urgent=True)       somebody waits for it
    run(spec, open_engine=hub.view)                     a job, in a thread of its own

Urgent requests go before all others. While somebody had an urgent one in the last minute, the
others leave a few slots free for the next. Who is next decides no token: neighbours change none.
"""

import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeAlias

from dspark_batch.errors import Resumable
from dspark_batch.intake.mapping import Render
from dspark_batch.intake.messages import Conversation
from dspark_batch.opening import Opened, Steps
from dspark_batch.record.formats import Manifest
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Failure, Item, Outcome, Partial, Request

# What a ticket's owner is told: how far the answer is, how it ended, or why the hub has ended.
News: TypeAlias = Partial | Outcome | BaseException
Tell: TypeAlias = Callable[[News], None]

_STOPPED = Resumable("the server stops; send it again later.")
CANCELLED = "cancelled"  # the code of a request that was given up

_LIVE_S = 60.0  # after an urgent request, for which slots are kept free
_AFTERMATH_S = 0.1  # of a thread, where nobody tells whether it is gone
_FEWEST_AHEAD = 16  # requests that wait in the engine, so that equal beginnings meet
_ASK_S = 1.0  # after which a job is asked whether it goes on
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds to a first token


class Ticket:
    """A request in a hub, for its owner to give up."""

    def __init__(self, hub: "Hub", request: Request, tell: Tell, *, urgent: bool) -> None:
        self.request = request
        self.urgent = urgent
        self._tell = tell
        self._hub = hub
        self.item = request.item  # as the engine knows it: with a number of its own
        self.num_seen = 0  # tokens that the owner was told of
        self.is_wanted = True  # False: the owner has given it up
        self.came_s = time.monotonic()

    def cancel(self) -> None:
        """Give it up, wherever it is; the owner hears of a failure "cancelled", or of its end."""
        self._hub.order(partial(self._hub.give_up, self))

    def withdraw(self) -> None:
        """Give it up as `cancel` does, unless its answer has begun."""
        self._hub.order(partial(self._hub.give_up, self, only_waiting=True))

    def tell(self, news: News) -> None:
        """Tell the owner, who says by which name an item is known."""
        if isinstance(news, Completion | Failure):
            news = news._replace(item=self.request.item)
        self._tell(news)


class Counts:
    """What a hub has done since it began; other threads may read it."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generated_tokens = 0
        self.rounds = self.drafted = self.accepted = 0
        self.ended: Counter[str] = Counter()  # finish reason or error code -> requests
        self.first_tokens = [0] * (len(_BUCKETS) + 1)  # urgent requests, by seconds waited
        self.first_token_s = 0.0

    buckets = _BUCKETS

    def add(self, outcome: Outcome) -> None:
        """Count what ended."""
        if isinstance(outcome, Failure):
            self.ended[outcome.code] += 1
            return
        self.ended[outcome.finish_reason] += 1
        self.prompt_tokens += outcome.prompt_tokens
        self.generated_tokens += len(outcome.token_ids)
        self.rounds += len(outcome.accept_lengths)
        self.drafted += sum(outcome.num_drafted)
        self.accepted += sum(outcome.num_accepted)

    def add_first_token(self, seconds: float) -> None:
        """Count how long somebody waited for a first token."""
        self.first_tokens[sum(seconds > bucket for bucket in _BUCKETS)] += 1
        self.first_token_s += seconds


class Hub:
    """Owns the thread that owns MLX.

    Args:
        open_engine: loads the engine; runs in that thread. Its engine is one of `Steps`.
        live_slots: how many are kept free for urgent requests; None: an eighth, at least one.
        on_end: is called in that thread when it ends for any reason but `close`.

    Attributes:
        counts: what it has done.
        error: why it ended; None: it has not.
    """

    def __init__(
        self,
        open_engine: Callable[[], Opened],
        *,
        live_slots: int | None = None,
        on_end: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.counts = Counts()
        self.error: BaseException | None = None
        self._open_engine = open_engine
        self._live_slots = live_slots
        self._on_end = on_end
        self._rendering = threading.Lock()
        self._lock = threading.Lock()  # orders come before the end, or are refused
        self._orders: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._is_open = threading.Event()  # or has failed to open
        self._opened: Opened | None = None
        self._engine: Steps  # from when it is open; only the hub's thread may use it
        self._bulk: deque[Ticket] = deque()  # not in the engine yet
        self._inside: dict[int, Ticket] = {}  # in the engine, by number
        self._again: set[int] = set()  # of those, who is on the way back into `_bulk`
        self._num_items = 0
        self._is_closing = False
        self._last_urgent_s = float("-inf")
        self._beat_s: float | None = None  # when a round began; None: it waits for orders
        self._thread = threading.Thread(target=self._live, name="hub", daemon=True)
        self._thread.start()

    # What other threads call.

    def opened(self) -> Opened:
        """Wait until the engine is there.

        Raises:
            BaseException: what kept it from being there.
        """
        self._is_open.wait()
        if self._opened is None:
            raise self._reason
        return self._opened

    @property
    def _reason(self) -> BaseException:
        """Why it ended, where it has."""
        return self.error or Resumable("the server has not begun; send it again later.")

    @property
    def is_open(self) -> bool:
        """Whether the engine is there."""
        return self._opened is not None and self.error is None

    def seconds_in_round(self) -> float:
        """Tell for how long the round that runs now has been running; 0: none does."""
        began = self._beat_s
        return 0.0 if began is None else time.monotonic() - began

    def put(self, request: Request, tell: Tell, *, urgent: bool = False) -> Ticket:
        """Let a request wait for a slot.

        Args:
            request: what to answer.
            tell: is called in the hub's thread, and must not block: after each round with what
                there is of an urgent answer, and once with how it ended.
            urgent: whether somebody waits for it.

        Raises:
            BaseException: what has ended the hub.
        """
        ticket = Ticket(self, request, tell, urgent=urgent)
        if not self.order(lambda: self._take(ticket)):
            raise self._reason
        return ticket

    def _render(self, render: Render, conversation: Conversation, **told: bool) -> Sequence[int]:
        """Turn a conversation into ids; a tokenizer is one thread's at a time."""
        with self._rendering:
            return render(conversation, **told)

    def order(self, do: Callable[[], object]) -> bool:
        """Let the hub's thread do something before its next round; False: it has ended."""
        with self._lock:
            if self.error is None:
                self._orders.put(do)
            return self.error is None

    def view(
        self, spec: Spec, manifest: Manifest | None, stop: Callable[[], bool] = lambda: False
    ) -> Opened:
        """Open the engine for a job, which shares it with others.

        Its clock, its costs and its audits are not the job's. Once `stop` says yes, requests that
        have not begun are taken back.
        """
        opened = self.opened()
        return opened._replace(
            engine=View(self, self._most_inside, stop),
            baseline=None,
            leave_out=lambda seconds: None,
            keep_learnt=lambda: None,
        )

    @property
    def num_running(self) -> int:
        """How many requests have a slot, at most."""
        slots = self._opened.slots if self._opened else 0
        return min(len(self._inside), slots)

    @property
    def num_waiting(self) -> int:
        """How many requests have none."""
        return len(self._inside) + len(self._bulk) - self.num_running

    def close(self) -> None:
        """End; who still waits is told so, and nobody waits for an engine that is not there yet."""
        self._is_closing = True
        if self._opened is not None:  # or it still loads, also where this was called before
            self.order(lambda: None)  # it may sleep
            _wait_for_end_of(self._thread)
        else:
            self._end(_STOPPED)

    # What only the hub's own thread calls.

    def _live(self) -> None:
        try:
            opened = self._open_engine()
            self._engine = opened.steps
            self._opened = opened._replace(render=partial(self._render, opened.render))
            self._is_open.set()
            while not self._is_closing:
                self._obey()
                self._admit()
                self._round()
            self._opened.keep_learnt()
            self._end(_STOPPED)
        except BaseException as error:  # noqa: BLE001  whatever it is, all who wait hear of it
            self._end(error)

    def _obey(self) -> None:
        """Do what was ordered; wait for an order where there is nothing else to do."""
        if self._engine.is_idle and not self._bulk:
            self._beat_s = None
            order = self._orders.get()
            self._beat_s = time.monotonic()
            order()
        while not self._orders.empty():
            self._orders.get()()

    @property
    def _is_live(self) -> bool:
        return time.monotonic() - self._last_urgent_s < _LIVE_S

    @property
    def _most_inside(self) -> int:
        """How many that nobody waits for help the engine to choose who goes together."""
        slots = self.opened().slots
        return slots + slots // 2 + max(_FEWEST_AHEAD, 2 * slots)

    @property
    def _most_beside_urgent(self) -> int:
        slots, kept = self.opened().slots, self._live_slots
        return max(1, slots - (max(1, slots // 8) if kept is None else kept))

    def _take(self, ticket: Ticket) -> None:
        if self.error is not None:  # it came while the hub ended
            ticket.tell(self.error)
            return
        ticket.item = ticket.request.item._replace(index=self._num_items)
        self._num_items += 1
        if not ticket.urgent:
            self._bulk.append(ticket)
            return
        was_quiet = not self._is_live
        self._last_urgent_s = time.monotonic()
        self._enter(ticket)
        if was_quiet:
            self._make_room()

    def _enter(self, ticket: Ticket) -> None:
        self._inside[ticket.item.index] = ticket
        request = replace(ticket.request, item=ticket.item)
        self._engine.add(request, urgent=ticket.urgent)

    def _admit(self) -> None:
        """Let as many into the engine that nobody waits for as leave room for those who do."""
        most = self._most_beside_urgent if self._is_live else self._most_inside
        num_inside = sum(not ticket.urgent for ticket in self._inside.values())
        while self._bulk and num_inside < most:
            self._enter(self._bulk.popleft())
            num_inside += 1

    def _make_room(self) -> None:
        """Take back those that nobody waits for and that have not begun."""
        others = [t for t in self._inside.values() if not t.urgent and t.is_wanted]
        waiting = [t for t in others if self._engine.so_far(t.item) is None]
        too_many = max(0, len(others) - self._most_beside_urgent)
        for ticket in waiting[max(0, len(waiting) - too_many) :]:
            self._again.add(ticket.item.index)
            self._engine.cancel(ticket.item)

    def give_up(self, ticket: Ticket, *, only_waiting: bool = False) -> bool:
        """Give a request up, in the hub's thread; return whether its answer ends with that."""
        if ticket in self._bulk:
            self._bulk.remove(ticket)
            ticket.tell(_cancelled(ticket.request.item))
            return True
        if ticket.item.index not in self._inside:
            return False
        ticket.is_wanted = ticket.is_wanted and only_waiting
        if only_waiting and self._engine.so_far(ticket.item) is not None:
            return False
        ticket.is_wanted = False
        self._engine.cancel(ticket.item)
        return True

    def _round(self) -> None:
        self._beat_s = time.monotonic()
        for outcome in self._engine.step():
            self._hand_out(outcome)
        for ticket in list(self._inside.values()):
            if ticket.urgent and (partial := self._engine.so_far(ticket.item)):
                self._tell_of(ticket, partial)

    def _tell_of(self, ticket: Ticket, partial: Partial) -> None:
        if not ticket.num_seen:
            self.counts.add_first_token(time.monotonic() - ticket.came_s)
        if len(partial.token_ids) > ticket.num_seen:
            ticket.num_seen = len(partial.token_ids)
            ticket.tell(partial)

    def _hand_out(self, outcome: Outcome) -> None:
        number = outcome.item.index
        ticket = self._inside.pop(number)
        if number in self._again:
            self._again.remove(number)
            if isinstance(outcome, Failure) and outcome.code == CANCELLED and ticket.is_wanted:
                self._bulk.appendleft(ticket)
                return
        if ticket.urgent and not ticket.num_seen and isinstance(outcome, Completion):
            self.counts.add_first_token(time.monotonic() - ticket.came_s)
        self.counts.add(outcome)
        ticket.tell(outcome)

    def _end(self, error: BaseException) -> None:
        """Tell all who wait, and let nobody else in."""
        with self._lock:
            if self.error is not None:  # closed while the engine was being opened
                return
            self.error = error
        self._beat_s = None
        self._is_open.set()
        tickets = [*self._inside.values(), *self._bulk]
        self._inside.clear()
        self._bulk.clear()
        for ticket in tickets:
            ticket.tell(error)
        while not self._orders.empty():
            self._orders.get()()
        if not self._is_closing:
            self._on_end(error)


def _wait_for_end_of(thread: threading.Thread) -> None:
    """Wait until a thread is gone, with what MLX keeps for it.

    MLX drops the compiled functions of a thread after Python's own end of it, and needs Python for
    that. If the process ends meanwhile, it aborts. `join` waits so long only since Python 3.13.
    """
    thread.join()
    if sys.platform != "linux":
        time.sleep(_AFTERMATH_S)
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        time.sleep(0.001)


class View:
    """An engine for one job, which shares it with others.

    Args:
        hub: that has the engine.
        most: requests of this job that are in the hub at a time.
        stop: asked about each second, in the caller's thread, whether the job ends.
    """

    def __init__(self, hub: Hub, most: int, stop: Callable[[], bool]) -> None:
        self._hub, self._most, self._stop = hub, most, stop

    def generate(
        self,
        stream: Iterable[Request | Failure | None],
        may_begin: Callable[[Item], bool] = lambda item: True,
    ) -> Iterator[Outcome]:
        """Answer a stream as `opening.Generates` has it.

        `may_begin` is asked in the caller's thread, when a request goes into the hub. After a no,
        requests that have not begun are taken back.

        Raises:
            BaseException: what has ended the hub.
        """
        job = _Job(self._hub, iter(stream), may_begin)
        try:
            while True:
                yield from job.put(self._most)
                if not job.tickets:
                    return
                outcome = job.next_outcome()
                if outcome is not None:
                    yield outcome
                if self._stop():
                    job.end()
        finally:
            for ticket in job.tickets.values():
                ticket.cancel()


class _Job:
    """One walk of a view through a stream."""

    def __init__(
        self,
        hub: Hub,
        stream: Iterator[Request | Failure | None],
        may_begin: Callable[[Item], bool],
    ) -> None:
        self.tickets: dict[int, Ticket] = {}  # by a number of their own
        self._hub, self._stream, self._may_begin = hub, stream, may_begin
        self._ended: queue.SimpleQueue[tuple[int, Outcome | BaseException]] = queue.SimpleQueue()
        self._numbers = count()
        self._may_go_on = True

    def put(self, most: int) -> Iterator[Failure]:
        """Put requests into the hub until there are enough; failures pass through."""
        while self._may_go_on and len(self.tickets) < most:
            pulled = next(self._stream, None)
            if pulled is None:
                return
            if isinstance(pulled, Failure):
                yield pulled
            elif self._may_begin(pulled.item):
                number = next(self._numbers)
                self.tickets[number] = self._hub.put(pulled, partial(self._hear, number))
            else:
                self.end()

    def end(self) -> None:
        """Take back what has not begun, and put in nothing more."""
        if self._may_go_on:
            self._may_go_on = False
            for ticket in self.tickets.values():
                ticket.withdraw()

    def next_outcome(self) -> Outcome | None:
        """Wait for one; None: there is none yet, or a request was taken back."""
        try:
            number, news = self._ended.get(timeout=_ASK_S)
        except queue.Empty:
            return None
        del self.tickets[number]
        if isinstance(news, BaseException):
            raise news
        is_back = isinstance(news, Failure) and news.code == CANCELLED
        return None if is_back else news

    def _hear(self, number: int, news: News) -> None:
        if not isinstance(news, Partial):
            self._ended.put((number, news))


def _cancelled(item: Item) -> Failure:
    return Failure(item, CANCELLED, f"{item.where}: given up before its answer began.")
