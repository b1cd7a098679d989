"""The run directory `OUT.run/`: who holds it, which job it holds, and whether that job is done.

An empty directory, or one with only a lock, holds no job. A job begins with its manifest, which is
written once. Its output exists if and only if the job is complete: the output is the last thing
to appear, and the first to go when rows are added again.
"""

import fcntl
import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import orjson

from dspark_batch.errors import JournalError, OutputInUse, ResumeMismatch, UsageError
from dspark_batch.intake import remote
from dspark_batch.intake.reader import STDIN_NAME, Source, printable, spool
from dspark_batch.record.disk import (
    full_disk_is_resumable,
    make_directory,
    sync_directory,
    write_json,
)
from dspark_batch.record.formats import (
    AuditJson,
    Begun,
    FingerprintJson,
    InputJson,
    Manifest,
    ReportJson,
    SavedReport,
)
from dspark_batch.spec.spec import Spec, number_or_none
from dspark_batch.types import Json, SetupJson

MANIFEST_VERSION = 2
SEAL = "sha256"  # of the manifest's other keys, as JSON with sorted keys

# Every field that can change a row, and which rows a shard has; no other. Those of the model come
# from the engine half.
SPEC_FIELDS = (
    "shard",
    *("system_prompt", "prompt_column", "messages_column", "output_prefix", "max_tokens"),
    *("template", "on_overflow", "keep", "drop", "output_column", "format", "id_column"),
    *("system_column", "last_assistant", "regenerate", "ignore_fields", "special_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "sampling"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "bad_words", "min_tokens"),
    *("ignore_eos", "logprobs", "prompt_logprobs", "score"),
    *("json_schema", "regex", "grammar", "choice"),
)
MODEL_FIELDS = (
    "target",
    "tokenizer",
    "chat_template",
    "thinking",
    "dtype",
    "target_bits",
    "numerics",
)
# Of the spec: equal options, equal model.
MODEL_OPTIONS = ("family", "target", "thinking", "dtype", "target_bits", "trust_remote_code")
# With the rejection rule an answer depends on what was drafted, and on what of it was verified.
DRAFTER_FIELDS = ("drafter", "drafter_bits", "calibration")
DRAFTER_OPTIONS = ("drafter", "drafter_bits")
PLAN_FIELDS = ("draft_length", "confidence_threshold")

_PACKAGES = ("dspark-batch", "mlx", "mlx-lm", "pyarrow", "llguidance")


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a job that had something to generate."""

    began: float  # Unix time at which decoding began, s
    load_s: float
    inputs: tuple[str, ...]  # as typed
    limit: int | None  # only the first N records
    total: int  # rows of the job
    resumed: int  # rows that earlier starts left


class RunDir:
    """The files of one job. Owns none of their contents."""

    def __init__(self, out: str) -> None:
        self.url = out if remote.is_url(out) else None  # where the output is put; None: here
        local = remote.local_name(out) if self.url else out
        self.out = Path(local)
        self.path = Path(f"{local}.run")
        self.rows = self.path / "rows.jsonl"
        self.attempts = self.path / "attempts.jsonl"
        self.stdin = self.path / "stdin.jsonl"
        self.fetched = self.path / "fetched"
        self._lock = self.path / "lock"
        self._manifest = self.path / "manifest.json"
        self._report = self.path / "report.json"
        self._starts = self.path / "starts.json"
        self.page = self.path / "report.html"
        self.audit = self.path / "audit.json"
        self.audited = self.path / "audit.jsonl"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the output against other runs; a dead holder never blocks.

        A directory in which no job begins goes away again.

        Raises:
            OutputInUse: another process holds it.
            UsageError: the place cannot be written.
        """
        is_new = not self.path.exists()
        fd = self._open_lock()
        try:
            self._take(fd)
            try:
                yield
            finally:
                if is_new and not self.has_job():
                    self._leave_nothing()
        finally:
            os.close(fd)

    def discard(self) -> None:
        """Forget the job and its output, in an order that is a valid state at every step."""
        self.withdraw_output()
        self.attempts.unlink(missing_ok=True)
        self.rows.unlink(missing_ok=True)
        sync_directory(self.path)  # rows must not come back to a job without a manifest
        shutil.rmtree(self.fetched, ignore_errors=True)
        self._starts.unlink(missing_ok=True)
        self._manifest.unlink(missing_ok=True)

    def withdraw_output(self) -> None:
        """Withdraw the output, because rows are added. They all stay in the journal."""
        self.out.unlink(missing_ok=True)
        self._report.unlink(missing_ok=True)
        self.page.unlink(missing_ok=True)
        self.audit.unlink(missing_ok=True)
        self.audited.unlink(missing_ok=True)

    def manifest(self) -> Manifest | None:
        """Read what this directory holds; None: no job yet.

        Raises:
            JournalError: rows or a manifest that this program did not leave so.
        """
        if not self._manifest.exists():
            if self.rows.exists() and self.rows.stat().st_size:
                raise JournalError(
                    f"{self.rows}: rows without their manifest.json; restore it, or start over "
                    "with --overwrite."
                )
            return None
        try:
            manifest: Manifest = orjson.loads(self._manifest.read_bytes())
        except orjson.JSONDecodeError as error:
            raise JournalError(
                f"{self._manifest}: damaged ({error}); restore it, or start over with --overwrite."
            ) from error
        if manifest["version"] != MANIFEST_VERSION:
            raise ResumeMismatch(
                f"{self.path} was written by another version of dspark-batch (format "
                f"{manifest['version']}, expected {MANIFEST_VERSION}); use another output."
            )
        return manifest

    def take_stdin(self, stream: BinaryIO, manifest: Manifest | None) -> None:
        """Keep a copy of standard input; a job that goes on must be given the same again.

        Raises:
            ResumeMismatch: it is not what the first start read.
        """
        draft = self.stdin.with_name(self.stdin.name + ".tmp")
        with full_disk_is_resumable(self.stdin):
            digest = spool(stream, draft)
        inputs = manifest["inputs"] if manifest else ()
        known = {file["path"]: file["sha256"] for file in inputs}
        if known.get(STDIN_NAME, digest) != digest:
            size = draft.stat().st_size
            draft.unlink()
            raise ResumeMismatch(
                f"standard input is not what the first start read: {size} bytes with SHA-256 "
                f"{digest[:12]}… and not {known[STDIN_NAME][:12]}…. Pipe the same again (a copy is "
                f"{self.stdin}), or start over with --overwrite."
            )
        draft.replace(self.stdin)

    def write_manifest(self, manifest: Manifest) -> None:
        """Begin a job; the manifest gets a digest of itself."""
        write_json(self._manifest, {**manifest, SEAL: _digest(manifest)})

    def add_start(self, start: Start) -> None:
        """Note a start; for people, nothing depends on it."""
        write_json(self._starts, {"starts": [*map(asdict, self.starts()), asdict(start)]})

    def starts(self) -> list[Start]:
        """List the starts that generated, the first one first."""
        if not self._starts.exists():
            return []
        return [Start(**start) for start in orjson.loads(self._starts.read_bytes())["starts"]]

    def holder(self) -> str | None:
        """Name the process that holds the lock; None: nobody does."""
        try:
            fd = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            # Shared, and for a moment only: two that look at once do not see each other.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._lock.read_text().strip() or "another process"
        finally:
            os.close(fd)
        return None

    def has_job(self) -> bool:
        """Whether a job of this directory has begun."""
        return self._manifest.exists()

    def has_output(self) -> bool:
        """Whether a job of this directory was completed and its output is still there."""
        return self.out.exists() and self._report.exists()

    def report(self) -> ReportJson | None:
        """Read the report of the output; None: the job is not complete."""
        return self._saved()["report"] if self.has_output() else None

    def inputs(self) -> Sequence[InputJson] | None:
        """Read which inputs the output was written of; None: the job is not complete."""
        return self._saved()["inputs"] if self.has_output() else None

    def _saved(self) -> SavedReport:
        saved: SavedReport = orjson.loads(self._report.read_bytes())
        return saved

    def write_audit(self, audit: AuditJson) -> None:
        """Keep what an audit found."""
        write_json(self.audit, audit)

    def last_audit(self) -> AuditJson | None:
        """Read what the last audit of these rows found; None: there was none."""
        return orjson.loads(self.audit.read_bytes()) if self.audit.exists() else None

    def finished_report(
        self, inputs: Sequence[InputJson], total: int, samples: int
    ) -> ReportJson | None:
        """Read the report of the output if `total` rows about these inputs are in it, else None."""
        if not self.has_output():
            return None
        saved = self._saved()
        report = saved["report"]
        same = saved["inputs"] == list(inputs) and report["total"] == total
        return report if same and report["samples"] == samples else None

    def publish(self, whole: Path, report: ReportJson, inputs: Sequence[InputJson]) -> None:
        """Make a written and synced file the output."""
        if self.url is not None:
            remote.put(whole, self.url)
        write_json(self._report, {"report": report, "inputs": inputs})
        with full_disk_is_resumable(self.out):
            whole.replace(self.out)
            sync_directory(self.out.parent)

    def _open_lock(self) -> int:
        try:
            if not self.path.is_dir():
                make_directory(self.path)
            return os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(
                f"{self.path}: the run directory cannot be made here ({error.strerror}); "
                "choose an output in a directory that you can write to."
            ) from error

    def _leave_nothing(self) -> None:
        """Take away what a start made that was refused; a directory with anything in it stays."""
        with suppress(OSError):  # a folder of fetched files, for example, is not empty
            self.stdin.unlink(missing_ok=True)  # the next start reads it anew
            if self.rows.exists() and not self.rows.stat().st_size:
                self.rows.unlink()
            if self.fetched.exists():
                self.fetched.rmdir()
            if list(self.path.iterdir()) == [self._lock]:
                self._lock.unlink()
                self.path.rmdir()

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._lock.exists() or not os.path.samestat(os.fstat(fd), self._lock.stat()):
                raise BlockingIOError  # its holder took the directory away, and made none
        except BlockingIOError as error:
            holder = self.holder() or "another process"
            raise OutputInUse(
                f"{self.out} is in use by {holder}; wait for it, or choose another output."
            ) from error
        except OSError as error:
            raise UsageError(
                f"{self.path}: this file system has no locks ({error.strerror}); choose an output "
                "on a local disk."
            ) from error
        with suppress(OSError):  # a full disk: only the name in a message is lost
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def run_dir_of(name: str) -> RunDir:
    """Find the run directory of an output, which may be named itself as well."""
    is_run_dir = name.rstrip("/").endswith(".run") and Path(name).is_dir()
    return RunDir(name.rstrip("/").removesuffix(".run") if is_run_dir else name)


def check_out(run_dir: RunDir, sources: Sequence[Source]) -> None:
    """Refuse an output that is a directory, one of the inputs, or where none can be written."""
    out = run_dir.out
    if run_dir.url is not None:
        remote.refuse_unwritable(run_dir.url)
    if out.is_dir():
        raise UsageError(f"{out}: is a directory; name a file.")
    for source in sources:
        if out.exists() and source.path.exists() and out.samefile(source.path):
            raise UsageError(f"{out} is an input as well; choose another output.")


def check_resume(spec: Spec, run_dir: RunDir, manifest: Manifest | None) -> None:
    """Refuse a start that the options, another job, or a file that is not ours rule out.

    Raises:
        UsageError: `resume` asks for what is not there, or the output is not ours.
        ResumeMismatch: the directory holds a job with other options.
    """
    if manifest is None and spec.resume == "always":
        raise UsageError(f"{run_dir.path} holds nothing to resume; drop --resume always.")
    if manifest is not None and spec.resume == "never":
        raise UsageError(
            f"{run_dir.path} holds a job already; drop --resume never to continue it, or start "
            "over with --overwrite."
        )
    if run_dir.out.exists() and (manifest is None or not run_dir.has_output()):
        raise UsageError(
            f"{run_dir.out} exists, and it is not the output of a job in {run_dir.path}; choose "
            "another output, or replace it with --overwrite."
        )
    if manifest is not None:
        refuse_another_job(run_dir, manifest, _spec_fields(spec))


def fingerprint(
    spec: Spec, identity: Mapping[str, str | None], context_length: int
) -> dict[str, Json]:
    """Collect everything that can change a row."""
    names: tuple[str, ...] = MODEL_FIELDS
    if _depends_on_drafts(spec):
        names += DRAFTER_FIELDS
    if _depends_on_drafts(spec) and number_or_none(spec.draft_length) is not None:
        names += ("drafting",)  # a whole block is made as it always was
    model = {name: identity.get(name) for name in names}
    return {**_spec_fields(spec), **model, "context_length": context_length}


def begun_with(
    fields: Mapping[str, Json], identity: Mapping[str, str | None], setup: SetupJson | None
) -> Begun:
    """Describe with what a job begins to compute; the arguments are those of `new_manifest`."""
    as_written = orjson.loads(orjson.dumps(fields))  # where a tuple is a list
    fingerprint: FingerprintJson = {"sha256": _digest(fields), "fields": as_written}
    return {"fingerprint": fingerprint, "identity": identity, "setup": setup}


def new_manifest(
    spec: Spec,
    fields: Mapping[str, Json],
    identity: Mapping[str, str | None],
    inputs: Sequence[InputJson],
    run_id: str,
    setup: SetupJson | None,
) -> Manifest:
    """Describe a job before its first token."""
    begun = begun_with(fields, identity, setup)
    return {
        "version": MANIFEST_VERSION,
        "run_id": run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": {name: _printable(value) for name, value in asdict(spec).items()},
        "inputs": inputs,
        "fingerprint": begun["fingerprint"],
        "identity": identity,
        "setup": setup,
        "versions": versions(),
        "platform": {"system": platform.system(), "machine": platform.machine()},
    }


def _printable(value: Json) -> Json:
    """Make the names of files sayable."""
    if isinstance(value, tuple):
        return [_printable(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def is_as_written(manifest: Manifest) -> bool:
    """Whether a manifest has the digest of all else that is in it."""
    return manifest.get(SEAL) == _digest({k: v for k, v in manifest.items() if k != SEAL})


def new_run_id() -> str:
    """Name a run, so that its journal cannot be taken for another's."""
    return secrets.token_hex(16)


def refuse_another_job(
    run_dir: RunDir,
    manifest: Manifest,
    fields: Mapping[str, Json],
    setup: SetupJson | None = None,
) -> None:
    """Compare a fingerprint, or a part of it, with the one in the manifest.

    Args:
        run_dir: of the job.
        manifest: of its first start.
        fields: of the fingerprint, of this start.
        setup: of this start, whose machine may have another `numerics`; None: nothing is loaded.

    Raises:
        ResumeMismatch: naming each key that differs, and both values.
    """
    differing = differences(manifest, fields, setup=setup)
    if differing:
        raise ResumeMismatch(
            f"{run_dir.path} holds another job: {'; '.join(differing)}. Put the old values back, "
            "choose another output, or start over with --overwrite."
        )


def differences(
    begun: Begun,
    fields: Mapping[str, Json],
    there_and_here: tuple[str, str] = ("there", "here"),
    setup: SetupJson | None = None,
) -> list[str]:
    """Say of each key of a fingerprint that is another what both values are.

    Args:
        begun: of one job, as its manifest has it.
        fields: of the other's fingerprint.
        there_and_here: how the two are called.
        setup: of the other, to say why its `numerics` is another; None: nothing is loaded.
    """
    there = begun["fingerprint"]["fields"]
    # Through JSON, as the manifest went: a tuple and a list are the same value.
    here = orjson.loads(orjson.dumps(fields))
    first, second = there_and_here
    differing = [name for name, value in here.items() if there.get(name) != value]
    said = [
        f"{name} is {_short(there.get(name))} {first} and {_short(here[name])} {second}"
        for name in differing
    ]
    if "numerics" in differing:
        # In whole, since a kernel's name stands at the end.
        before = begun["setup"]["machine"] if begun["setup"] else {}
        said += [
            f"its {name} was {before.get(name)} {first} and is {value} {second}"
            for name, value in (setup["machine"] if setup else {}).items()
            if before.get(name) != value
        ]
    return said


def asks_for_same_model(spec: Spec, manifest: Manifest) -> bool:
    """Whether the model options are those of the manifest, so that no model has to be loaded."""
    names = MODEL_OPTIONS + DRAFTER_OPTIONS if _depends_on_drafts(spec) else MODEL_OPTIONS
    return all(getattr(spec, name) == manifest["spec"].get(name) for name in names)


def _spec_fields(spec: Spec) -> dict[str, Json]:
    names = SPEC_FIELDS + PLAN_FIELDS if _depends_on_drafts(spec) else SPEC_FIELDS
    return {name: getattr(spec, name) for name in names}


def _depends_on_drafts(spec: Spec) -> bool:
    return spec.sampling == "rejection"


def _digest(fields: Mapping[str, object]) -> str:
    return sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).hexdigest()


def versions() -> dict[str, str]:
    """Say what runs: Python and the packages that can change an answer."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _short(value: Json) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else f"{text[:59]}…"
