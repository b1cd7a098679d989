"""Live answers, whole or as a stream of events, as long as the client is there."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import orjson
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dspark_batch.engine.fallback import FAULTS
from dspark_batch.hub import CANCELLED, Hub, News, Ticket
from dspark_batch.opening import split
from dspark_batch.output.responses import body_of
from dspark_batch.record.rows import answer_row
from dspark_batch.serve.asking import Asked
from dspark_batch.serve.growing import Delta, Growing, Unkept
from dspark_batch.serve.problems import Problem, busy, ended, problem_of
from dspark_batch.serve.service import Service
from dspark_batch.types import Completion, Failure, Json, Logprobs, Partial

T = TypeVar("T")

_KEEP_ALIVE_S = 15.0  # without news, after which a client hears that the server lives
_WAITING_PER_SLOT = 4
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects events makes no stream of them
]


class Desk:
    """Puts live requests into the hub, and refuses more than can wait.

    Args:
        service: the server.
        hub: which answers.
    """

    def __init__(self, service: Service, hub: Hub) -> None:
        self.service, self.hub = service, hub
        self._num_live = 0

    def put(self, asked: Asked) -> "Answers":
        """Begin to answer.

        Raises:
            Problem: too many wait.
        """
        slots, most = self.hub.opened().slots, self.service.max_waiting
        most = slots * _WAITING_PER_SLOT if most is None else most
        if self._num_live and self._num_live + len(asked.requests) > slots + most:
            raise busy("Too many requests wait for a slot; try again.", "too_many_requests")
        self._num_live += len(asked.requests)
        return Answers(asked, self.service, self.hub, partial(self._left, len(asked.requests)))

    def _left(self, num_requests: int) -> None:
        self._num_live -= num_requests


class Answers:
    """The answers to one live request while they are made; for the event loop's thread."""

    def __init__(self, asked: Asked, service: Service, hub: Hub, leave: Callable[[], None]) -> None:
        self._asked, self._service, self._leave = asked, service, leave
        self._opened = hub.opened()
        self._loop = asyncio.get_running_loop()
        self._deadline = None
        if service.request_timeout is not None:
            self._deadline = self._loop.time() + service.request_timeout
        self._has_news = asyncio.Event()
        # By choice: only the latest is kept, so that who reads slowly costs no memory.
        self._partials: list[Partial | None] = [None] * len(asked.requests)
        self._ends: list[News | None] = [None] * len(asked.requests)
        prefix = "chatcmpl" if asked.is_chat else "cmpl"
        self._head: dict[str, Json] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model_names[0],
        }
        self._tickets: list[Ticket] = []
        self._is_closed = False
        try:
            for n, request in enumerate(asked.requests):
                self._tickets.append(hub.put(request, partial(self._tell, n), urgent=True))
        except BaseException as error:
            self.close()
            raise ended(error) from error

    def close(self) -> None:
        """Give up what has not ended; once is enough, and more is no mistake."""
        if self._is_closed:
            return
        self._is_closed = True
        for ticket, end in zip(self._tickets, self._ends, strict=False):
            if end is None:
                ticket.cancel()
        self._leave()

    async def whole(self) -> dict[str, Json]:
        """Wait for the whole answer.

        Raises:
            Problem: there is none.
        """
        while None in self._ends:
            await self._news()
        return self._body([self._completion(end) for end in self._ends if end is not None])

    async def events(self) -> AsyncGenerator[bytes]:
        """Give the answer as a stream of events."""
        try:
            async for event in self._deltas():
                yield b"data: " + event + b"\n\n" if event else b": keep-alive\n\n"
            yield b"data: [DONE]\n\n"
        except Problem as problem:
            yield b"data: " + orjson.dumps(problem.body) + b"\n\n"
        except FAULTS as error:  # the tokenizer's: it has no text for these ids
            what = Problem(500, f"No text ({type(error).__name__}: {error}).", code="engine")
            yield b"data: " + orjson.dumps(what.body) + b"\n\n"

    async def _deltas(self) -> AsyncIterator[bytes]:
        """Give the events; b"" where a client must hear something, and there is no news."""
        spec, requests = self._service.spec, self._asked.requests
        growing = [Growing(request, spec, self._opened) for request in requests]
        ended_at: dict[int, Completion] = {}
        if self._asked.is_chat:
            yield self._chunk(0, {"role": "assistant", "content": ""})
        while len(ended_at) < len(requests):
            if not await self._news_or_nothing():
                yield b""
                continue
            for n, each in enumerate(growing):
                if n not in ended_at:
                    for event in self._new_of(n, each, ended_at):
                        yield event
        if self._asked.has_usage:
            body = self._body([ended_at[n] for n in range(len(requests))])
            yield self._chunk(None, None, usage=body["usage"])

    def _new_of(self, n: int, growing: Growing, ended_at: dict[int, Completion]) -> list[bytes]:
        """Give the events of one choice that has not ended, and note its end."""
        if (end := self._ends[n]) is not None:
            ended_at[n] = self._completion(end)
            return self._last(n, growing, ended_at[n])
        partial_ = self._partials[n]
        if partial_ is None:
            return []
        event = self._next(n, growing, growing.add(partial_), partial_.logprobs)
        return [event] if event else []

    def _last(self, n: int, growing: Growing, completion: Completion) -> list[bytes]:
        try:
            event = self._next(n, growing, growing.end(completion), completion.logprobs)
        except Unkept:
            message = "The tokenizer decodes the whole answer otherwise than its beginning."
            raise Problem(500, f"{message} Ask without stream.", code="engine") from None
        told = growing.told(completion.logprobs, is_chat=self._asked.is_chat)
        last = self._chunk(n, None, finish=completion.finish_reason, logprobs=told)
        return [*filter(None, [event]), last]

    def _next(
        self, n: int, growing: Growing, delta: Delta, logprobs: Logprobs | None
    ) -> bytes | None:
        """Write what is new; tokens without text wait with their log-probabilities for the next."""
        said = {"reasoning_content": delta.reasoning, "content": delta.text}
        said = {name: text for name, text in said.items() if text}
        if not said:
            return None
        told = growing.told(logprobs, is_chat=self._asked.is_chat)
        return self._chunk(n, said, logprobs=told)

    def _chunk(
        self,
        n: int | None,
        delta: dict[str, str] | None,
        *,
        finish: str | None = None,
        logprobs: Json = None,
        usage: Json = None,
    ) -> bytes:
        """Write an event; about no choice, if `n` is None."""
        if self._asked.is_chat:
            said: dict[str, object] = {"delta": delta or {}}
        else:
            said = {"text": (delta or {}).get("content", "")}
        choice = {"index": n, **said, "logprobs": logprobs, "finish_reason": finish}
        kind = "chat.completion.chunk" if self._asked.is_chat else "text_completion"
        chunk = {**self._head, "object": kind, "choices": [] if n is None else [choice]}
        return orjson.dumps(chunk | ({"usage": usage} if self._asked.has_usage else {}))

    def _body(self, completions: list[Completion]) -> dict[str, Json]:
        """Write the answer as a job writes it; several texts are choices of one answer."""
        bodies: list[dict[str, Any]] = [
            body_of(each.item, answer_row(each), self._head) for each in completions
        ]
        first, *others = bodies
        if not others:
            return first
        choices = [body["choices"][0] | {"index": n} for n, body in enumerate(bodies)]
        usage = _sum(*(body["usage"] for body in bodies))
        return first | {"choices": choices, "usage": usage, "metrics": None}

    def _completion(self, end: News) -> Completion:
        if isinstance(end, BaseException):
            raise ended(end)
        if isinstance(end, Failure):
            raise self._late() if end.code == CANCELLED else problem_of(end)
        if isinstance(end, Partial):  # no ticket ends so
            raise ended(TypeError("an answer that still grows was taken for its end"))
        return split(self._service.spec, self._opened, end)

    async def _news_or_nothing(self) -> bool:
        """Wait for news; False: there were none for a while."""
        try:
            async with asyncio.timeout(_KEEP_ALIVE_S):
                await self._news()
        except TimeoutError:
            return False
        return True

    async def _news(self) -> None:
        """Wait for news.

        Raises:
            Problem: the time is up.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._has_news.wait()
        except TimeoutError:
            raise self._late() from None
        self._has_news.clear()

    def _late(self) -> Problem:
        limit = self._service.request_timeout
        return Problem(408, f"There was no whole answer within {limit} s.", code="timeout")

    def _tell(self, n: int, news: News) -> None:
        """Hear from the hub, in its thread."""
        try:
            self._loop.call_soon_threadsafe(self._hear, n, news)
        except RuntimeError:  # the loop has ended, and with it whoever asked
            return

    def _hear(self, n: int, news: News) -> None:
        if isinstance(news, Partial):
            self._partials[n] = news
        else:
            self._ends[n] = news
        self._has_news.set()


def _sum(first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Add up counts, and counts inside counts."""
    total = dict(first)
    for other in others:
        for name, value in other.items():
            is_inner = isinstance(value, dict)
            total[name] = _sum(total[name], value) if is_inner else total[name] + value
    return total


class Answering(Response):
    """The answers to a live request, as long as the client is there."""

    def __init__(self, answers: Answers, *, is_streamed: bool) -> None:
        super().__init__()
        self._answers, self._is_streamed = answers, is_streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            if self._is_streamed:
                await _while_there(receive, self._stream(send))
                return
            response = await _while_there(receive, self._whole())
        finally:
            self._answers.close()
        if response is not None:
            await response(scope, receive, send)

    async def _whole(self) -> Response:
        try:
            return JSONResponse(await self._answers.whole())
        except Problem as problem:
            return problem.response()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200}
        await send(start | {"headers": _EVENTS})
        async with aclosing(self._answers.events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _while_there(receive: Receive, work: Coroutine[None, None, T]) -> T | None:
    """Do something as long as the client is there; None: it went."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait({task, gone})


async def _gone(receive: Receive) -> None:
    """Wait until the client goes."""
    while (await receive())["type"] != "http.disconnect":
        pass
