"""Batches: each is a job of `run`, which survives what the server survives, and what it does not.

    batches/batch_…/batch.json       what clients are told; written whole at each change of status
    batches/batch_…/input.jsonl      the upload, also if that is deleted
    batches/batch_…/out.jsonl, out.jsonl.run/        the job

    validating -> failed
               -> in_progress -> finalizing -> completed
                              -> cancelling -> cancelled
                              -> expired

A batch whose status is not final is run again when the server starts. That is all of recovery.
"""

import logging
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import orjson

from dspark_batch.errors import OutputInUse, Resumable, UsageError
from dspark_batch.hub import Hub
from dspark_batch.intake.json_text import keys_twice, said_twice
from dspark_batch.intake.openai import CHAT, COMPLETIONS
from dspark_batch.intake.reader import digest_of
from dspark_batch.output.export import export
from dspark_batch.record.disk import full_disk_is_resumable, make_directory
from dspark_batch.record.run_dir import RunDir
from dspark_batch.run import Tick, run
from dspark_batch.serve.files import Files, Object, new_id, read_object, write_object
from dspark_batch.serve.problems import Problem, bad_field, not_found
from dspark_batch.serve.service import Service
from dspark_batch.spec.budget import seconds_of
from dspark_batch.types import Json

log = logging.getLogger("dspark_batch.serve")

FINAL = ("completed", "failed", "cancelled", "expired")
_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")
_MOST_ERRORS = 100  # of an input, that a client is told of
_MOST_METADATA = 16
_AGAIN_S = 30.0  # after which a batch that could not go on is tried again
_WHY = {
    "cancelled": "The batch was cancelled before this request began.",
    "expired": "The batch's completion window ended before this request began.",
}
_BOM = b"\xef\xbb\xbf"


class Batches:
    """The batches of a server, which run one after the other in the order in which they came.

    Args:
        service: the server.
        files: where inputs come from and outputs go.
        hub: which answers.
    """

    def __init__(self, service: Service, files: Files, hub: Hub) -> None:
        self._service, self._files, self._hub = service, files, hub
        self._folder = service.data_dir / "batches"
        self._lock = threading.Lock()  # of the objects
        self._is_closing = threading.Event()
        self._to_do: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()  # these need not wait
        self._objects: dict[str, Object] = {}  # by id, the oldest first
        for folder in sorted(self._folder.glob("batch_*/")):
            told = read_object(folder / "batch.json")
            if told is None:  # a crash while it was made; nobody was told of it
                shutil.rmtree(folder)
                continue
            self._objects[folder.name] = told
            if told["status"] not in FINAL:
                log.info("%s goes on", folder.name)
                self._to_do.put(folder.name)
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    # What clients ask for.

    def create(self, asked: Object) -> Object:
        """Take a batch on.

        Raises:
            Problem: it cannot be made.
        """
        fields = _checked(asked)
        upload = self._files.find(fields["input_file_id"])
        if upload["purpose"] != "batch":
            raise bad_field("input_file_id", "`input_file_id` is no upload for a batch.")
        batch_id, now = new_id("batch_"), int(time.time())
        told: Object = {
            "id": batch_id,
            "object": "batch",
            **fields,
            "errors": None,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + int(_seconds(fields["completion_window"])),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        folder = self._folder / batch_id
        try:
            with full_disk_is_resumable(folder):
                make_directory(folder)
                self._files.link(upload["id"], folder / "input.jsonl")
            write_object(folder / "batch.json", told)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            self._objects[batch_id] = told
        self._to_do.put(batch_id)
        return told

    def find(self, batch_id: str) -> Object:
        """Look a batch up.

        Raises:
            Problem: there is none.
        """
        with self._lock:
            if batch_id not in self._objects:
                raise not_found("batch", batch_id)
            return self._objects[batch_id]

    def all(self) -> list[Object]:
        """List the batches, the newest first."""
        with self._lock:
            return list(reversed(self._objects.values()))

    def cancel(self, batch_id: str) -> Object:
        """Stop a batch; what is answered stays.

        Raises:
            Problem: there is none, or it has ended.
        """
        self.find(batch_id)
        told = self._note(batch_id, "cancelling", unless=(*FINAL, "finalizing", "cancelling"))
        if told["status"] != "cancelling":
            raise Problem(
                409, f"The batch is {told['status']} and cannot be cancelled.", code="conflict"
            )
        self._cancelled.put(batch_id)
        return told

    def forget_before(self, seconds: float) -> None:
        """Delete batches that ended, and files that came, before a time since 1970."""
        for told in self.all():
            if told["status"] in FINAL and told[f"{told['status']}_at"] < seconds:
                with self._lock:
                    del self._objects[told["id"]]
                shutil.rmtree(self._folder / told["id"])
        for told in self._files.all():
            if told["created_at"] < seconds:
                self._files.delete(told["id"])

    def close(self) -> None:
        """Stop, once the hub has ended; the next start goes on."""
        self._is_closing.set()
        self._to_do.put(None)
        self._thread.join()

    # What the thread does.

    def _work(self) -> None:
        while (batch_id := self._to_do.get()) is not None and not self._is_ending:
            self._try(batch_id)

    @property
    def _is_ending(self) -> bool:
        """Whether the next start goes on."""
        return self._is_closing.is_set() or self._hub.error is not None

    def _try(self, batch_id: str) -> None:
        """Carry a batch out; what goes wrong is told, and others go on."""
        try:
            self._carry_out(batch_id)
        except (Resumable, OutputInUse) as error:  # the disk is full, say, or `status` looks
            if not self._is_ending:
                log.warning("%s: %s", batch_id, error)
                self._is_closing.wait(_AGAIN_S)
                self._to_do.put(batch_id)
        except Exception as error:  # noqa: BLE001  an error of ours
            if not self._is_ending:
                log.warning("%s: %s: %s", batch_id, type(error).__name__, error)
                with suppress(Resumable):  # nor can this be written: the next start tries again
                    self._fail(batch_id, [_error("server", f"{type(error).__name__}: {error}")])

    def _carry_out(self, batch_id: str) -> None:
        """Bring a batch to its end from wherever it is."""
        told = self.find(batch_id)
        if told["status"] in FINAL:  # it was cancelled while it waited
            return
        if "in_progress_at" not in told:
            total, errors = self._validated(batch_id)
            if errors:
                self._fail(batch_id, errors)
                return
            counts = {"total": total, "completed": 0, "failed": 0}
            self._note(batch_id, "in_progress", unless=["cancelling"], request_counts=counts)
        try:
            if not self._is_stopped(batch_id):
                self._run(batch_id)
        except Resumable:
            if self._is_ending or not self._is_stopped(batch_id):
                raise
        if self._is_stopped(batch_id):
            self._end_early(batch_id)
        else:
            self._complete(batch_id)

    def _validated(self, batch_id: str) -> tuple[int, list[Json]]:
        """Count the requests of an input, and say what is wrong with it as a whole."""
        told, path = self._objects[batch_id], self._input(batch_id)
        service = self._service
        if path.stat().st_size > service.max_batch_bytes:
            message = f"The input has more than {service.max_batch_bytes} bytes; split it."
            return 0, [_error("file_too_large", message)]
        total = 0
        errors: list[Json] = []
        seen: dict[str, int] = {}
        for number, line in _lines(path):
            total += 1
            if total > service.max_batch_requests:
                continue
            problem = _problem_in(line, told["endpoint"], number, seen)
            if problem is not None and len(errors) < _MOST_ERRORS:
                errors.append(problem)
        if total == 0:
            errors.append(_error("empty_file", "The input has no requests."))
        if total > service.max_batch_requests:
            most = f"at most {service.max_batch_requests} (--max-batch-requests)"
            message = f"The input has {total} requests, expected {most}."
            errors.append(_error("too_many_requests", message))
        return total, errors

    def _run(self, batch_id: str) -> None:
        def observe(tick: Tick) -> None:
            counts = {"completed": tick.done - tick.failed, "failed": tick.failed}
            counts = {"total": tick.total, **counts}
            with self._lock:
                self._objects[batch_id] = self._objects[batch_id] | {"request_counts": counts}
            while not self._cancelled.empty():
                if (other := self._cancelled.get()) != batch_id:
                    self._try(other)

        is_over = False  # and stays so in this start, wherever clocks are put

        def stop() -> bool:
            nonlocal is_over
            is_over = is_over or self._is_closing.is_set() or self._is_stopped(batch_id)
            return is_over

        spec = replace(
            self._service.spec,
            inputs=(str(self._input(batch_id)),),
            out=str(self._out(batch_id)),
            format="openai",
        )
        open_engine = partial(self._hub.view, stop=stop)
        run(spec, observe=observe, open_engine=open_engine, stop=stop)

    def _is_stopped(self, batch_id: str) -> bool:
        """Whether a batch goes no further than it is."""
        told = self.find(batch_id)
        is_late = told["status"] != "finalizing" and time.time() >= told["expires_at"]
        return told["status"] == "cancelling" or is_late

    def _complete(self, batch_id: str) -> None:
        self._note(batch_id, "finalizing")
        self._publish(batch_id, "completed", self._finished_lines(batch_id, self._out(batch_id)))

    def _end_early(self, batch_id: str) -> None:
        """Keep what is answered, and say of all else why it is not."""
        is_cancelled = self.find(batch_id)["status"] == "cancelling"
        status = "cancelled" if is_cancelled else "expired"
        self._publish(batch_id, status, self._lines_until(batch_id, status))

    def _lines_until(self, batch_id: str, status: str) -> Iterator[Object]:
        done: set[str] = set()
        out = self._out(batch_id)
        if RunDir(str(out)).has_job():
            partial = out.with_name("partial.jsonl")
            export(str(out), str(partial), overwrite=True)
            for line in self._finished_lines(batch_id, partial):
                done.add(line["custom_id"])
                yield line
            partial.unlink()
        for _, asked in _lines(self._input(batch_id)):
            custom_id = orjson.loads(asked)["custom_id"]
            if custom_id not in done:
                error = {"code": f"batch_{status}", "message": _WHY[status]}
                name = f"batch_req_{digest_of(custom_id.encode())[:24]}"
                yield {"id": name, "custom_id": custom_id, "response": None, "error": error}

    def _finished_lines(self, batch_id: str, path: Path) -> Iterator[Object]:
        """Read the lines of a job, with the names that model and input have for clients."""
        where = f"{self._input(batch_id)}:"
        with path.open("rb") as file:
            for line in map(orjson.loads, file):
                if line["response"] is not None:
                    line["response"]["body"]["model"] = self._service.model_names[0]
                else:
                    line["error"]["message"] = line["error"]["message"].replace(where, "line ", 1)
                yield line

    def _publish(self, batch_id: str, status: str, lines: Iterator[Object]) -> None:
        """Write answers to one file and failures to another; a file without a line is none."""
        drafts = {name: self._folder / batch_id / f"{name}.tmp" for name in ("output", "error")}
        counts = {"output": 0, "error": 0}
        with full_disk_is_resumable(drafts["output"]), ExitStack() as stack:
            files = {name: stack.enter_context(path.open("wb")) for name, path in drafts.items()}
            for line in lines:
                name = "output" if line["error"] is None else "error"
                files[name].write(orjson.dumps(line) + b"\n")
                counts[name] += 1
        ids = {}
        for name, draft in drafts.items():
            file_id = f"file-{batch_id.removeprefix('batch_')}{'0' if name == 'output' else '1'}"
            if counts[name]:
                self._files.keep(draft, file_id, f"{batch_id}_{name}.jsonl", "batch_output")
            else:
                draft.unlink()
            ids[f"{name}_file_id"] = file_id if counts[name] else None
        told = {"completed": counts["output"], "failed": counts["error"]}
        told = {"total": sum(counts.values()), **told}
        self._note(batch_id, status, unless=(), request_counts=told, **ids)

    def _fail(self, batch_id: str, errors: list[Json]) -> None:
        self._note(batch_id, "failed", errors={"object": "list", "data": errors})

    def _note(
        self, batch_id: str, status: str, *, unless: Sequence[str] = (), **changes: Json
    ) -> Object:
        """Change a status, unless it is one of others by now, and let it survive everything."""
        with self._lock:
            told = self._objects[batch_id] | changes
            if told["status"] not in unless:
                told |= {"status": status, f"{status}_at": int(time.time())}
                log.info("%s", _news(told))
            write_object(self._folder / batch_id / "batch.json", told)
            self._objects[batch_id] = told
            return told

    def _input(self, batch_id: str) -> Path:
        return self._folder / batch_id / "input.jsonl"

    def _out(self, batch_id: str) -> Path:
        return self._folder / batch_id / "out.jsonl"


def _news(told: Object) -> str:
    """Say for the log how far a batch is; nothing of what it asks."""
    counts, errors = told["request_counts"], told["errors"]
    said = f"{told['id']} is {told['status']}"
    if errors:
        first = errors["data"][0]
        return f"{said}: {first['code']}" + (f" in line {first['line']}" if first["line"] else "")
    return f"{said}: {counts['completed']} of {counts['total']} requests have an answer"


def _checked(asked: Object) -> Object:
    """Read the body of a new batch."""
    for name in asked:
        if name not in _FIELDS and asked[name] is not None:
            raise Problem(400, f"`{name}` is not supported.", param=name, code="unsupported")
    given: Object = {name: asked.get(name) for name in _FIELDS}
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(given[name], str):
            shown = orjson.dumps(given[name]).decode()
            raise bad_field(name, f"`{name}` is {shown}, expected a string.")
    if given["endpoint"] not in (CHAT, COMPLETIONS):
        raise bad_field("endpoint", f"`endpoint` is not {CHAT} or {COMPLETIONS}.")
    _seconds(given["completion_window"])
    if not _is_metadata(given["metadata"]):
        raise bad_field("metadata", f"`metadata` is no object of at most {_MOST_METADATA} texts.")
    return given


def _is_metadata(value: Json) -> bool:
    if not isinstance(value, dict):
        return value is None
    return len(value) <= _MOST_METADATA and all(isinstance(v, str) for v in value.values())


def _seconds(window: str) -> float:
    try:
        return seconds_of(window)
    except UsageError as error:
        message = f"`completion_window` is {window!r}, expected a duration such as 24h or 7d."
        raise bad_field("completion_window", message) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            bare = line.removeprefix(_BOM) if number == 1 else line
            if bare.strip():
                yield number, bare


def _problem_in(line: bytes, endpoint: str, number: int, seen: dict[str, int]) -> Json:
    """Say why a line makes the whole input unusable; what it asks is its own affair."""
    record, problem = _record_in(line, number)
    if problem is not None:
        return problem
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return _error("missing_required_parameter", "`custom_id` is no text.", number, "custom_id")
    if custom_id in seen:
        message = f"`custom_id` is {custom_id!r} as in line {seen[custom_id]}."
        return _error("duplicate_custom_id", message, number, "custom_id")
    seen[custom_id] = number
    expected = (("url", endpoint, "mismatched_endpoint"), ("method", "POST", "invalid_method"))
    for name, value, code in expected:
        if record.get(name) != value:
            message = f"`{name}` is {record.get(name)!r}, expected {value!r}."
            return _error(code, message, number, name)
    if not isinstance(record.get("body"), dict):
        return _error("missing_required_parameter", "`body` is no object.", number, "body")
    return None


def _record_in(line: bytes, number: int) -> tuple[Object, Json]:
    """Read a line; with a problem beside it, it is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return {}, _error("invalid_json_line", f"This line is no JSON ({error}).", number)
    if not isinstance(record, dict):
        return {}, _error("invalid_request", "This line is no object.", number)
    if any(twice := keys_twice(line, record)):
        return {}, _error("invalid_json_line", f"In this line {said_twice(twice)}", number)
    return record, None


def _error(code: str, message: str, line: int | None = None, param: str | None = None) -> Json:
    return {"code": code, "message": message, "line": line, "param": param}
