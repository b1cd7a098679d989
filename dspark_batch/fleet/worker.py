"""What runs in a worker's process: a hub with a resident pair, and a queue of what it tells.

Ray calls the methods in threads of its own, several at a time. They touch queues only; all that
touches MLX is done by the hub's thread.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from dspark_batch.audit.replay import Against, Baseline, Margin
from dspark_batch.errors import DsparkBatchError, Resumable, is_out_of_memory
from dspark_batch.fleet.news import Answers, Death, Hello, News
from dspark_batch.hub import Hub, Ticket
from dspark_batch.hub import News as HubNews
from dspark_batch.opening import Opened
from dspark_batch.types import Completion, Failure, Outcome, Request

T = TypeVar("T")

_HEARTBEAT_S = 5.0  # after which it says that there is nothing to say
_MOST_TOLD = 512  # outcomes in one answer


class Worker:
    """An actor.

    Args:
        place: in the team; names it where no GPU does.
        open_engine: loads the pair, in the hub's thread.
    """

    def __init__(self, place: int, open_engine: Callable[[], Opened]) -> None:
        self._place = place
        self._told: SimpleQueue[Outcome | Death] = SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by number, the last to come last; the hub's thread
        self._to_replay: dict[Against, SimpleQueue[Request]] = {}
        self._baselines: dict[Against, Baseline] = {}
        self._hub = Hub(open_engine, on_end=lambda error: self._told.put(_death(error)))

    def hello(self) -> News:
        """Wait until the pair is loaded, or cannot be."""
        try:
            opened = self._hub.opened()
        except DsparkBatchError as error:
            return error
        except BaseException as error:  # noqa: BLE001  whatever it is, the driver hears of it
            return _death(error)
        return Hello(
            self._name(),
            opened.slots,
            opened.context_length,
            dict(opened.identity),
            opened.setup,
            opened.vocab_size,
        )

    def _name(self) -> str:
        """Name the GPU that Ray gave to this process, if it did."""
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or str(self._place)
        return f"{socket.gethostname()}:{gpu}"

    def put(self, requests: Sequence[Request], against: Against | None) -> None:
        """Let requests wait for the engine, or for a baseline."""
        if against is None:
            self._hub.order(partial(self._admit, requests))
            return
        waiting = self._to_replay.setdefault(against, SimpleQueue())
        for request in requests:
            waiting.put(request)
        self._hub.order(partial(self._replay, against, waiting))

    def news(self) -> list[News]:
        """Wait for something to tell, and tell all that there is."""
        told: list[Outcome | Death] = []
        try:
            told.append(self._told.get(timeout=_HEARTBEAT_S))
            while len(told) < _MOST_TOLD:
                told.append(self._told.get_nowait())
        except Empty:
            pass
        outcomes = [each for each in told if isinstance(each, Completion | Failure)]
        deaths = [each for each in told if isinstance(each, Death)]
        gauge = self._hub.opened().gauge() if self._hub.is_open else None
        return [Answers(outcomes, gauge), *deaths]

    def take_back(self, most: int) -> None:
        """Give requests back that have not begun; they come as failures "cancelled"."""
        self._hub.order(partial(self._give_back, most))

    def margin(
        self, request: Request, answer: Sequence[int], tokens: tuple[int, int], against: Against
    ) -> Margin:
        """Say how clear a choice of the target is."""
        return self._do(lambda: self._baseline(against).margin(request, answer, tokens))

    def end(self) -> None:
        """Keep what it learnt, and end."""
        self._hub.close()

    def _do(self, what: Callable[[], T]) -> T:
        """Do something in the hub's thread, and wait for it.

        Raises:
            Resumable: the hub has ended.
        """
        done: SimpleQueue[T] = SimpleQueue()
        self._hub.order(lambda: done.put(what()))
        while self._hub.error is None:
            try:
                return done.get(timeout=1)
            except Empty:
                continue
        raise Resumable(f"the worker ended ({self._hub.error}).")

    # What only the hub's thread calls.

    def _admit(self, requests: Sequence[Request]) -> None:
        if self._hub.error is not None:  # which the driver hears of
            return
        for request in requests:
            number = request.item.index
            self._tickets[number] = self._hub.put(request, partial(self._hear, number))

    def _hear(self, number: int, news: HubNews) -> None:
        del self._tickets[number]
        if isinstance(news, Completion | Failure):  # else the hub has ended, and tells so itself
            self._told.put(news)

    def _give_back(self, most: int) -> None:
        for ticket in reversed(list(self._tickets.values())):
            if most > 0:
                most -= self._hub.give_up(ticket, only_waiting=True)

    def _baseline(self, against: Against) -> Baseline:
        if against not in self._baselines:
            make = self._hub.opened().baseline
            if make is None:
                raise Resumable("this engine has no baseline.")
            self._baselines[against] = make(against)
        return self._baselines[against]

    def _replay(self, against: Against, waiting: SimpleQueue[Request]) -> None:
        """Answer all that waits; the engine's own clock does not count this."""
        if waiting.empty():
            return
        began = time.monotonic()
        for outcome in self._baseline(against).generate(_Waiting(waiting)):
            self._told.put(outcome)
        self._hub.opened().leave_out(time.monotonic() - began)


class _Waiting:
    """What is in a queue now; after its end it may go on, as streams may."""

    def __init__(self, waiting: SimpleQueue[Request]) -> None:
        self._waiting = waiting

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        try:
            return self._waiting.get_nowait()
        except Empty:
            raise StopIteration from None


def _death(error: BaseException) -> Death:
    return Death(f"{type(error).__name__}: {error}", is_out_of_memory(error))
