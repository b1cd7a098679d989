"""What a client is told when it cannot have what it asked for, in OpenAI's shape."""

import re
from collections.abc import Mapping

from starlette.responses import JSONResponse

from dspark_batch.errors import Resumable, is_out_of_memory
from dspark_batch.intake.openai import is_text
from dspark_batch.types import Failure, Json

_FIELD = re.compile(r"`(?:body(?:\.|`: ))?(\w+)")
_RETRY = {"Retry-After": "2"}


class Problem(Exception):
    """An answer that is an error.

    Args:
        status: HTTP's.
        message: for people.
        param: the field that is at fault; None: none is.
        code: for programs; None: the status says all.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    @property
    def body(self) -> dict[str, Json]:
        """What is sent."""
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> JSONResponse:
        """Make the answer."""
        return JSONResponse(self.body, self.status, self.headers)


def bad_field(param: str, message: str) -> Problem:
    """Refuse a value."""
    return Problem(400, message, param=param, code="invalid_value")


def not_found(what: str, name: str) -> Problem:
    """Say that something is not there."""
    return Problem(404, f"No such {what}: {name!r}.", code="not_found")


def problem_of(failure: Failure) -> Problem:
    """Say why an item has no answer."""
    message = failure.message.removeprefix(f"{failure.item.where}: ")
    message = message.replace("Use --samples for several answers.", "Send several requests.")
    message = message.replace("leave it aside with", "start the server with")
    message = message[:1].upper() + message[1:]
    if failure.code == "prompt_too_long":
        param = "prompt" if is_text(failure.item.record) else "messages"
        return Problem(400, message, param=param, code="context_length_exceeded")
    if failure.code != "bad_record":
        return Problem(500, message, code=failure.code)
    field = _FIELD.search(message)
    code = "unsupported" if "not supported" in message else "invalid_value"
    return Problem(400, message, param=field and field[1], code=code)


def ended(error: BaseException) -> Problem:
    """Say that nobody answers any more."""
    if isinstance(error, Resumable):
        return Problem(503, "The server stops; try again later.", code="stopping", headers=_RETRY)
    why = "it is out of memory" if is_out_of_memory(error) else type(error).__name__
    return Problem(500, f"The engine has ended ({why}); the server stops.", code="engine")


def busy(message: str, code: str, status: int = 429) -> Problem:
    """Ask a client to come again."""
    return Problem(status, message, code=code, headers=_RETRY)
