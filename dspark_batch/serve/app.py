"""The endpoints, in OpenAI's words."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
import python_multipart  # noqa: F401  Starlette would miss it only when somebody uploads
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dspark_batch.errors import DsparkBatchError
from dspark_batch.hub import Hub
from dspark_batch.intake.json_text import keys_twice, said_twice
from dspark_batch.intake.openai import CHAT, COMPLETIONS
from dspark_batch.serve.answering import Answering, Desk
from dspark_batch.serve.asking import asked_in, check_model
from dspark_batch.serve.batches import Batches
from dspark_batch.serve.files import Files, page
from dspark_batch.serve.guard import Guard
from dspark_batch.serve.metrics import metrics
from dspark_batch.serve.problems import Problem, bad_field, busy, ended
from dspark_batch.serve.service import Service
from dspark_batch.types import Json

_LONGEST_ROUND_S = 30.0
_BATCHES_LISTED = 20
_FILES_LISTED = 10_000
_UPLOAD = "curl -F file=@requests.jsonl -F purpose=batch sends one"
_UPLOAD_FIELDS = ("file", "purpose")


class Endpoints:
    """Answers requests, with a hub and what is on the disk.

    Args:
        service: the server.
        hub: which answers.
        is_stopping: whether the server ends.
    """

    def __init__(self, service: Service, hub: Hub, is_stopping: Callable[[], bool]) -> None:
        self._service, self._hub, self._is_stopping = service, hub, is_stopping
        self._desk = Desk(service, hub)
        self._files = Files(service.data_dir / "files")
        self._batches = Batches(service, self._files, hub)
        self._began_s = int(time.time())
        if service.retain_s is not None:
            self._batches.forget_before(time.time() - service.retain_s)

    def app(self) -> Starlette:
        """Make the application; hub and batches end with it."""
        get, post, delete = (partial(Route, methods=[name]) for name in ("GET", "POST", "DELETE"))
        routes = [
            get("/health", self.health),
            get("/metrics", self.metrics),
            get("/v1/models", self.models),
            get("/v1/models/{name:path}", self.model),
            post(CHAT, self.answer),
            post(COMPLETIONS, self.answer),
            post("/v1/files", self.upload),
            get("/v1/files", self.list_files),
            get("/v1/files/{id}", self.file),
            delete("/v1/files/{id}", self.delete_file),
            get("/v1/files/{id}/content", self.content),
            post("/v1/batches", self.create_batch),
            get("/v1/batches", self.list_batches),
            get("/v1/batches/{id}", self.batch),
            post("/v1/batches/{id}/cancel", self.cancel_batch),
        ]
        guards = [Middleware(Guard, service=self._service, is_stopping=self._is_stopping)]
        if self._service.cors_origins:
            origins, every = self._service.cors_origins, ("*",)
            cors = Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=every, allow_headers=every
            )
            guards.insert(0, cors)
        handlers: dict[Any, Any] = {  # a handler takes the error that it is for
            Problem: _say,
            HTTPException: _say_http,
            DsparkBatchError: _say_own,
            ClientDisconnect: _say_nothing,
            Exception: _say_any,
        }
        return Starlette(
            routes=routes, middleware=guards, exception_handlers=handlers, lifespan=self._lifespan
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(self.close)

    def close(self) -> None:
        """End hub and batches; twice is no mistake."""
        self._hub.close()
        self._batches.close()

    async def health(self, request: Request) -> Response:
        """Say whether requests are answered."""
        hub, status = self._hub, "ok"
        if self._is_stopping() or hub.error is not None:
            status = "stopping"
        elif not hub.is_open:
            status = "loading"
        elif hub.seconds_in_round() > _LONGEST_ROUND_S:
            status = "stuck"
        told = {"status": status, "running": hub.num_running, "waiting": hub.num_waiting}
        return JSONResponse(told, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """Say what was done."""
        return PlainTextResponse(metrics(self._hub))

    async def models(self, request: Request) -> Response:
        """List the names of the model."""
        data = [self._model(name) for name in self._service.model_names]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        name = request.path_params["name"]
        check_model(name, self._service)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> Json:
        told: dict[str, Json] = {"id": name, "object": "model", "created": self._began_s}
        length = self._hub.opened().context_length if self._hub.is_open else None
        return told | {"owned_by": "dspark-batch", "max_model_len": length}

    async def answer(self, request: Request) -> Response:
        """Answer a chat, or go on with a text."""
        body = await _object_in(request)
        if self._hub.error is not None:
            raise ended(self._hub.error)
        if not self._hub.is_open:
            raise busy("The model is being loaded; try again.", "loading", 503)
        path = request.url.path
        asked = await run_in_threadpool(asked_in, body, path, self._service, self._hub)
        return Answering(self._desk.put(asked), is_streamed=asked.is_streamed)

    async def upload(self, request: Request) -> Response:
        """Keep a file."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Problem(400, f"An upload is a form: {_UPLOAD}.", code="invalid_value")
        async with request.form(max_files=1, max_fields=8) as form:
            for name in form:
                if name not in _UPLOAD_FIELDS:
                    raise Problem(
                        400, f"`{name}` is not supported.", param=name, code="unsupported"
                    )
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile):
                raise bad_field("file", "`file` is missing, or no file.")
            if not isinstance(purpose, str):
                raise bad_field("purpose", "`purpose` is missing, expected 'batch'.")
            name = upload.filename or "file"
            told = await run_in_threadpool(self._files.add, upload.file, name, purpose)
        return JSONResponse(told)

    def list_files(self, request: Request) -> Response:
        """List files."""
        return JSONResponse(page(self._files.all(), request.query_params, _FILES_LISTED))

    def file(self, request: Request) -> Response:
        """Describe a file."""
        return JSONResponse(self._files.find(request.path_params["id"]))

    def delete_file(self, request: Request) -> Response:
        """Forget a file; a batch that has it keeps it."""
        return JSONResponse(self._files.delete(request.path_params["id"]))

    def content(self, request: Request) -> Response:
        """Give the bytes of a file."""
        told = self._files.find(request.path_params["id"])
        path = self._files.path(told["id"])
        return FileResponse(path, media_type="application/octet-stream")

    async def create_batch(self, request: Request) -> Response:
        """Take a batch on."""
        body = await _object_in(request)
        return JSONResponse(await run_in_threadpool(self._batches.create, body))

    def list_batches(self, request: Request) -> Response:
        """List batches."""
        return JSONResponse(page(self._batches.all(), request.query_params, _BATCHES_LISTED))

    def batch(self, request: Request) -> Response:
        """Describe a batch."""
        return JSONResponse(self._batches.find(request.path_params["id"]))

    def cancel_batch(self, request: Request) -> Response:
        """Stop a batch."""
        return JSONResponse(self._batches.cancel(request.path_params["id"]))


async def _object_in(request: Request) -> dict[str, Json]:
    """Read a body that is a JSON object."""
    return await run_in_threadpool(_object, await request.body())


def _object(content: bytes) -> dict[str, Json]:
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise Problem(400, f"The body is no JSON ({error}).", code="invalid_json") from error
    if not isinstance(body, dict):
        raise Problem(400, "The body is no JSON object.", code="invalid_json")
    if any(twice := keys_twice(content, body)):
        said = said_twice(twice)
        raise Problem(400, said[:1].upper() + said[1:], code="invalid_json")
    return body


async def _say(request: Request, problem: Problem) -> Response:
    return problem.response()


async def _say_http(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405 and error.headers:
        can = error.headers["Allow"]
        message = f"{request.method} is not possible at {request.url.path}; {can} is."
        return Problem(405, message, headers=error.headers).response()
    if error.status_code == 404:
        message = f"There is no {request.method} {request.url.path} here. "
        message += "Clients need the base URL http://HOST:PORT/v1; GET /v1/models is there."
        return Problem(404, message, code="unknown_url").response()
    message = f"{error.detail.rstrip('.')}."
    return Problem(error.status_code, message, headers=error.headers).response()


async def _say_own(request: Request, error: DsparkBatchError) -> Response:
    return Problem(503, str(error), code="server").response()


async def _say_nothing(request: Request, error: ClientDisconnect) -> Response:
    """Answer a client that went before it had asked: nobody hears it."""
    return Response(status_code=400)


async def _say_any(request: Request, error: Exception) -> Response:
    return Problem(500, "An error of the server; its log says more.", code="server").response()
