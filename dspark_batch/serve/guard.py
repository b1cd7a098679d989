"""Who may ask, and how much: before any body is read."""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_batch.serve.problems import Problem, busy
from dspark_batch.serve.service import Service

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_OPEN = ("/health",)  # needs no key
_UPLOAD = "/v1/files"
_SILENCE_S = 30.0  # in the middle of a body
_BODY_S = 60.0  # for a whole body that is no upload
_DRAIN_S = 5.0  # in which a refused client may send the rest, so that it reads the answer


class Guard:
    """Refuses foreign hosts, wrong keys, and bodies that are too large or too slow.

    Args:
        app: what answers the others.
        service: the server.
        is_stopping: whether the server ends.
    """

    def __init__(self, app: ASGIApp, service: Service, is_stopping: Callable[[], bool]) -> None:
        self._app, self._service, self._is_stopping = app, service, is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._service.max_file if scope["path"] == _UPLOAD else self._service.max_body
        headers = Headers(scope=scope)
        try:
            self._refuse(scope, headers, most)
        except Problem as problem:
            if "expect" not in headers:
                await _drain(receive)
            await problem.response()(scope, receive, send)
            return
        body_s = None if scope["path"] == _UPLOAD else _BODY_S
        await self._app(scope, _Body(receive, most, body_s).receive, send)

    def _refuse(self, scope: Scope, headers: Headers, most: int) -> None:
        if self._service.is_loopback and not _is_local(headers.get("host", "")):
            message = (
                "The Host header names another machine, and this server answers only its own. "
            )
            message += "To serve others, start it with --host ADDRESS and --api-key-file FILE."
            raise Problem(403, message, code="foreign_host")
        self._refuse_page(headers.get("origin"))
        if scope["path"] not in _OPEN and not self._has_key(headers):
            raise Problem(
                *(401, "No API key of this server; send it as `Authorization: Bearer KEY`."),
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._is_stopping() and scope["path"] not in _OPEN:
            raise busy("The server stops; try again later.", "stopping", 503)
        if int(headers.get("content-length", 0)) > most:
            raise _too_large(most)

    def _refuse_page(self, origin: str | None) -> None:
        """Refuse scripts of pages; a browser may ask for them unasked, though with no key."""
        service = self._service
        if origin is not None and not (service.keys or {origin, "*"} & {*service.cors_origins}):
            message = f"Pages of {origin} may not ask; --cors-origin {origin} would let them."
            raise Problem(403, message, code="foreign_origin")

    def _has_key(self, headers: Headers) -> bool:
        if not self._service.keys:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")  # the bytes as they came
        found = [hmac.compare_digest(key, known.encode()) for known in self._service.keys]
        return kind.lower() == "bearer" and any(found)


class _Body:
    """A body, up to a size and a time."""

    def __init__(self, receive: Receive, most: int, seconds: float | None) -> None:
        self._receive, self._left = receive, most
        self._most, self._is_whole = most, False
        self._ends_s = None if seconds is None else time.monotonic() + seconds

    async def receive(self) -> Message:
        """Give the next part.

        Raises:
            Problem: it is too much, or too slow.
        """
        if self._is_whole:
            return await self._receive()
        left = _SILENCE_S
        if self._ends_s is not None:
            left = min(left, self._ends_s - time.monotonic())
        try:
            async with asyncio.timeout(left):
                message = await self._receive()
        except TimeoutError:
            problem = Problem(408, "The body came too slowly.", code="timeout")
            problem.headers = {"Connection": "close"}
            raise problem from None
        self._left -= len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._left < 0:
            raise _too_large(self._most)
        return message


def _too_large(most: int) -> Problem:
    return Problem(413, f"The body has more than {most} bytes.", code="too_large")


def _is_local(host: str) -> bool:
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name.lower() in _LOCAL:
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


async def _drain(receive: Receive) -> None:
    """Read what a refused client still sends, for a while; it may read nothing before."""
    try:
        async with asyncio.timeout(_DRAIN_S):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        return
