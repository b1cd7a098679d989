"""A server process: it listens, loads, answers, and ends when its engine does."""

import asyncio
import fcntl
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from dspark_batch.errors import (
    OutputInUse,
    Resumable,
    UsageError,
    is_out_of_memory,
)
from dspark_batch.hub import Hub
from dspark_batch.opening import Opened, open_pair
from dspark_batch.record.disk import make_directory
from dspark_batch.serve.app import Endpoints
from dspark_batch.serve.service import Service

log = logging.getLogger("dspark_batch.serve")

_HEADERS_S = 10.0  # in which a connection has to send a request's headers
_MOST_CONNECTIONS = 512
_UNREAD_S = 120.0  # after which a client that reads nothing is given up
_LAST_WORDS_S = 1.0  # after the engine's end, for clients to hear of it
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 2\r\n"
    b"Connection: close\r\n\r\n"
)


class Server:
    """Serves until it is stopped, or until its engine ends.

    Args:
        service: what it is to be.
        open_engine: loads what answers, in the hub's thread; None: the pair of the service.

    Attributes:
        hub: what answers, once it runs.
    """

    def __init__(self, service: Service, open_engine: Callable[[], Opened] | None = None) -> None:
        self._service = service
        self._open_engine = open_engine or (lambda: open_pair(service.spec, None))
        self._is_stopping = threading.Event()
        self._is_told = threading.Event()  # where it listens
        self._uvicorn: uvicorn.Server | None = None
        self._died: BaseException | None = None
        self.hub: Hub | None = None

    def run(self, ready: Callable[[str], None] = lambda url: None) -> None:
        """Serve; SIGINT and SIGTERM stop it.

        Args:
            ready: is told the URL once requests are taken; the model may still be loading.

        Raises:
            UsageError: it cannot begin.
            OutputInUse: another server has its data.
            BaseException: what ended the engine.
        """
        service = self._service
        with _locked(service.data_dir), _listening(service.host, service.port) as sock:
            self.hub = Hub(self._loaded, live_slots=service.live_slots, on_end=self._die)
            endpoints = Endpoints(service, self.hub, self._is_ending)
            self._uvicorn = _Listener(
                _config(endpoints.app(), service), self.hub, service.spec.grace
            )
            host, port = sock.getsockname()[:2]
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            self._is_told.set()
            if self._is_stopping.is_set():
                self._uvicorn.should_exit = True
            with suppress(KeyboardInterrupt):  # raised again after an end in good order
                self._uvicorn.run(sockets=[sock])
            endpoints.close()  # after a second Ctrl-C: in a round MLX would abort the process
        if self._died is not None:
            raise _reason(self._died)

    def stop(self) -> None:
        """End, from any thread: who is being answered has the grace, and batches wait."""
        self._is_stopping.set()
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def _loaded(self) -> Opened:
        """Load what answers, in the hub's thread; nothing for a folder that cannot be served."""
        self._is_told.wait()
        opened = self._open_engine()
        log.info("%s is loaded; requests are answered", ", ".join(self._service.model_names))
        return opened

    def _is_ending(self) -> bool:
        return self._is_stopping.is_set() or bool(self._uvicorn and self._uvicorn.should_exit)

    def _die(self, error: BaseException) -> None:
        """End because the engine has, in its thread; clients hear of it first."""
        self._died = error
        time.sleep(_LAST_WORDS_S)
        self.stop()


def _config(app: Starlette, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(service.spec.grace + _LAST_WORDS_S),
    )


def _reason(error: BaseException) -> BaseException:
    """Say why the engine has ended, with the exit code that a supervisor goes by."""
    if not is_out_of_memory(error):
        return error
    return Resumable(
        f"out of memory ({error}). Start again, with fewer --slots; batches go on from where they "
        "are."
    )


def _most_connections() -> int:
    """Leave half of the files that may be open at a time to batches."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if files < 0 else min(_MOST_CONNECTIONS, files // 2)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Have a folder for oneself."""
    try:
        for each in ("files", "batches"):
            make_directory(folder / each)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"--data-dir {folder}: {error.strerror}; name another.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise OutputInUse(f"--data-dir {folder}: another server has it; name another.") from error
    except OSError as error:
        os.close(fd)
        raise UsageError(
            f"--data-dir {folder}: this file system has no locks ({error.strerror}); name a folder "
            "on a local disk."
        ) from error
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        why, _, _ = (error.strerror or str(error)).partition(" (")  # Python adds the address
        raise UsageError(f"--host {host} --port {port}: {why}; choose another.") from error
    with sock:
        yield sock


class _Listener(uvicorn.Server):
    """Ends the hub when the grace is over, so that who is still being answered hears of it."""

    def __init__(self, config: uvicorn.Config, hub: Hub, grace_s: float) -> None:
        super().__init__(config)
        self._hub, self._grace_s = hub, grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._hub.error is None:
            log.info(
                "stopping; live answers have %g s, batches go on at the next start; "
                "Ctrl-C again stops at once",
                self._grace_s,
            )
        ends = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ends.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self._grace_s)
        await asyncio.to_thread(self._hub.close)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:  # answers are cut off as was asked; no tracebacks about them
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


class _Protocol(H11Protocol):
    """HTTP, without connections that say or read nothing, and as many as there is room for."""

    _unread: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # as uvicorn's own has it
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._limit = self.loop.call_later(_HEADERS_S, self.transport.close)
        if len(self.connections) > _most_connections():
            transport.write(_BUSY)
            transport.close()

    def data_received(self, data: bytes) -> None:
        was_answered = self._is_answered
        super().data_received(data)
        if not self._is_answered:  # the headers are there
            self._limit.cancel()
        elif was_answered and self._limit.cancelled():  # the next request begins
            self._limit = self.loop.call_later(_HEADERS_S, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(_UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.cancel()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    @property
    def _is_answered(self) -> bool:
        """Whether no request has come whole that has no answer yet."""
        return self.cycle is None or self.cycle.response_complete
