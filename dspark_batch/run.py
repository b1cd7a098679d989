"""The composition root: a job, from its inputs to its output.

    read -> skip what is finished -> map -> generate -> append

Everything is a generator and the last one pulls, so memory stays flat and a Ctrl-C between two
rows leaves nothing half done.
"""

import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from dspark_batch.audit.auditor import Auditor
from dspark_batch.audit.replay import Claim, claims_of, divergence_of
from dspark_batch.errors import DsparkBatchError, JournalError, Resumable, UsageError
from dspark_batch.intake import remote
from dspark_batch.intake.json_text import dump
from dspark_batch.intake.reader import (
    STDIN,
    Source,
    count_records,
    fetch,
    item_of,
    locate,
    printable,
    read,
)
from dspark_batch.opening import Opened, OpenEngine, answer, ask, open_pair
from dspark_batch.output.finish import Rows, changed_input, finish, line_maker
from dspark_batch.output.report import Report, Tick
from dspark_batch.record.attempts import MOST_CRASHES, Attempts, Lesson, lesson, poison
from dspark_batch.record.disk import full_disk_is_resumable
from dspark_batch.record.formats import Manifest, ReportJson
from dspark_batch.record.journal import Entry, Journal
from dspark_batch.record.named_columns import wanted_columns
from dspark_batch.record.rows import AnswerRow, row_of
from dspark_batch.record.run_dir import (
    RunDir,
    Start,
    asks_for_same_model,
    check_out,
    check_resume,
    fingerprint,
    new_manifest,
    new_run_id,
    refuse_another_job,
)
from dspark_batch.record.survey import Survey, most_bytes, survey
from dspark_batch.spec.budget import Budget
from dspark_batch.spec.spec import STDOUT, Spec, number_or_none
from dspark_batch.types import (
    Failure,
    Item,
    Outcome,
    Request,
    SetupJson,
)

if TYPE_CHECKING:
    from dspark_batch.models.hub import Download

__all__ = ["Report", "Tick", "run"]

log = logging.getLogger("dspark_batch")

Observe: TypeAlias = Callable[[Tick], None]
Stop: TypeAlias = Callable[[], bool]


def _ignore(tick: Tick) -> None:
    """Watch nothing."""


def _never() -> bool:
    """Go on to the end."""
    return False


def run(
    spec: Spec,
    *,
    observe: Observe = _ignore,
    open_engine: OpenEngine | None = None,
    stop: Stop = _never,
) -> Report:
    """Run a job to its end, from wherever an earlier start left it.

    Args:
        spec: the job. The same spec continues it.
        observe: called with a `Tick` when a stage begins, while models are downloaded, and after
            every row.
        open_engine: loads what generates, `open_pair` by default; called only if something is left
            to generate.
        stop: asked before each item is admitted; once it says yes, what is in flight is finished
            and the run ends with `Resumable`.

    Raises:
        DsparkBatchError: the run cannot begin or go on; its class knows the exit code. Finished
            rows stay in the journal.
    """
    if open_engine is None:
        _refuse_unknown(spec)
    if spec.out == STDOUT:
        return _run_to_stdout(spec, observe, open_engine, stop)
    budget = Budget(spec.deadline, spec.max_runtime)
    run_dir = RunDir(spec.out)
    sources = locate(spec.inputs, run_dir.stdin, run_dir.fetched, wanted_columns(spec))
    check_out(run_dir, sources)
    with run_dir.lock():
        if spec.overwrite:
            run_dir.discard()
        manifest = run_dir.manifest()
        check_resume(spec, run_dir, manifest)
        if run_dir.url is not None and not run_dir.has_output():
            begun = manifest is not None  # then what is there may be ours
            remote.refuse_taken(run_dir.url, overwrite=spec.overwrite or begun)
        if STDIN in spec.inputs:
            run_dir.take_stdin(sys.stdin.buffer, manifest)
        with full_disk_is_resumable(run_dir.fetched):
            fetch(sources)
        run_id = new_run_id() if manifest is None else manifest["run_id"]
        with full_disk_is_resumable(run_dir.rows):
            opened = Journal(run_dir.rows, run_id, fsync_every=spec.fsync_every)
        with opened as journal:
            found = survey(sources, spec, journal)
            learnt = lesson(run_dir.attempts, journal.size, found.is_to_do)
            spec = _with_slots_that_fit(spec, learnt)
            job = _Job(
                spec,
                *(run_dir, run_id, manifest, sources, journal, found, learnt),
                *(observe, stop, budget),
            )
            return _continued(job, open_engine)


def _refuse_unknown(spec: Spec) -> None:
    """Refuse what no loading could find, before anything is made."""
    from dspark_batch.models.pairs import known_pair

    if spec.family is not None:
        known_pair(spec.family)


def _run_to_stdout(
    spec: Spec, observe: Observe, open_engine: OpenEngine | None, stop: Stop
) -> Report:
    """Run a job whose rows are written as they finish, and of which nothing else is kept."""
    with TemporaryDirectory(prefix="dspark-batch-") as folder:
        kept = replace(spec, out=str(Path(folder, "rows.jsonl")))
        line_of = line_maker(kept, datetime.now(UTC))

        def write(tick: Tick) -> None:
            if tick.outcome is not None:
                line = line_of(tick.outcome.item, row_of(tick.outcome))
                with _stdout_is_needed():
                    is_odd = bool(tick.outcome.item.notes)
                    sys.stdout.buffer.write(dump(line, is_odd=is_odd) + b"\n")
                    sys.stdout.buffer.flush()
            observe(tick)

        try:
            report = run(kept, observe=write, open_engine=open_engine, stop=stop)
        except Resumable as error:
            said = str(error).removeprefix(f"{kept.out}: ")
            said, *_ = re.split(r"[,;.] (?:the same|Run the same|The finished rows)", said)
            raise Resumable(
                f"{STDOUT}: {said.removesuffix('.')}. Rows that were written are whole; nothing "
                "else is kept. Name a file with -o to be able to continue."
            ) from error
    return replace(report, out=STDOUT)


@contextmanager
def _stdout_is_needed() -> Iterator[None]:
    """End a run whose rows nobody takes any more."""
    try:
        yield
    except OSError as error:
        raise Resumable(f"cannot be written ({error.strerror or error})") from error


@dataclass(frozen=True, slots=True)
class _Job:
    """What every stage of one start needs."""

    spec: Spec
    run_dir: RunDir
    run_id: str
    manifest: Manifest | None  # None: the job has not begun
    sources: Sequence[Source]
    journal: Journal
    found: Survey
    learnt: Lesson
    observe: Observe
    stop: Stop
    budget: Budget

    def begun(self) -> Manifest:
        """Read the manifest of a job that has begun."""
        manifest = self.run_dir.manifest()
        if manifest is None:
            raise JournalError(f"{self.run_dir.path}: manifest.json is gone; restore it.")
        return manifest


def _continued(job: _Job, open_engine: OpenEngine | None) -> Report:
    """Do what is left: everything, the output only, or nothing."""
    found = job.found
    tick = Tick("load", found.total, found.resumed, found.failed, found.resumed)
    _warn_of_changed_inputs(job)
    if _has_all_rows(job):
        saved = job.run_dir.finished_report(found.inputs, found.total, job.spec.samples)
        return _nothing_to_do(saved) if saved else _finished(job, tick)
    _warn_of_little_space(job)
    if job.manifest is None:
        for hint in job.found.hints:
            log.warning("%s", hint)
    _warn_of_equal_samples(job.spec)
    began = time.monotonic()
    job.observe(tick)
    num_items = found.total - found.resumed
    open_engine = open_engine or _opener(job, tick, num_items)
    opened = open_engine(job.spec, job.manifest)
    with ExitStack() as stack:
        stack.callback(opened.close)
        _settle(job, opened)
        loaded = time.monotonic()
        _note_start(job, loaded - began)
        tick = _decoded(job, opened, tick)
    times = {"load_s": loaded - began, "decode_s": time.monotonic() - loaded}
    return _finished(job, tick, opened.setup, **times)


def _opener(job: _Job, tick: Tick, num_items: int) -> OpenEngine:
    """Choose what loads the pair: this process, or workers."""
    if not job.spec.is_fleet:
        return partial(open_pair, on_download=_told(job, tick), num_items=num_items)
    from dspark_batch.fleet.opener import open_fleet

    return partial(open_fleet, num_items=num_items)


def _warn_of_little_space(job: _Job) -> None:
    """Say before the start that the disk may become full; whether it will, the answers decide."""
    needed, free = most_bytes(job.found, job.spec), shutil.disk_usage(job.run_dir.path).free
    if free < needed:
        log.warning(
            "%s: rows and output may take up to %.1f GB, and %.1f GB are free. A full disk stops "
            "the run with every finished row safe; then make room and run the same command again.",
            *(job.run_dir.path, needed / 1e9, free / 1e9),
        )


def _with_slots_that_fit(spec: Spec, learnt: Lesson) -> Spec:
    """Take fewer slots than before after a start that ran out of memory."""
    asked = number_or_none(spec.slots)
    if learnt.slots is None or (asked is not None and learnt.slots >= asked):
        return spec
    log.warning(
        "an earlier start ran out of memory: taking slots %d instead of %s",
        *(learnt.slots, spec.slots),
    )
    return replace(spec, slots=learnt.slots)


def _told(job: _Job, tick: Tick) -> Callable[["Download"], None]:
    """Turn news of a download into ticks of the load stage."""

    def tell(download: "Download") -> None:
        done, total = download.done_bytes / 1e9, download.total_bytes / 1e9
        doing = f"downloading {download.name}, {done:.2f} of {total:.2f} GB"
        job.observe(replace(tick, doing=doing))

    return tell


def _has_all_rows(job: _Job) -> bool:
    """Whether no item is left, and the same model is meant, so that none has to be loaded."""
    if job.manifest is None or job.found.resumed < job.found.total:
        return False
    return asks_for_same_model(job.spec, job.manifest)


def _warn_of_changed_inputs(job: _Job) -> None:
    before = job.manifest["inputs"] if job.manifest else job.found.inputs
    if [file["sha256"] for file in before] != [file["sha256"] for file in job.found.inputs]:
        log.warning(
            "the input is not what it was at the first start: %d of %d records have a row already",
            job.found.resumed,
            job.found.total,
        )


def _warn_of_equal_samples(spec: Spec) -> None:
    """Say that several samples without chance are one and the same, unless items choose it."""
    if spec.samples > 1 and spec.sampling_of_all().is_greedy:
        log.warning(
            "samples is %d at temperature 0, where all samples of an item are the same; set a "
            "temperature",
            spec.samples,
        )


def _warn_of_growth(job: _Job) -> None:
    """Say that a file has more than what was counted at the start; the output has none of it."""
    for source, described in zip(job.sources, job.found.inputs, strict=True):
        if source.path.stat().st_size > described["bytes"]:
            log.warning(
                "%s grew while the job ran; run the same command again for the rest", source.name
            )


def _nothing_to_do(saved: ReportJson) -> Report:
    nothing: dict[str, Any] = dict.fromkeys(
        ("prefill_s", "round_s", "draft_s", "verify_s", "idle_s", "audit_s")
    )
    report = replace(Report(**saved), new_tokens=0, resumed=saved["total"])
    report = replace(report, load_s=0.0, decode_s=0.0, finish_s=0.0, peak_memory_bytes=None)
    report = replace(report, workers=())
    return replace(report, **nothing)


def _settle(job: _Job, opened: Opened) -> None:
    """Begin the job with what was loaded, or make sure that it began with the same."""
    fields = fingerprint(job.spec, opened.identity, opened.context_length)
    if job.manifest is not None:
        refuse_another_job(job.run_dir, job.manifest, fields, opened.setup)
        return
    manifest = new_manifest(
        job.spec, fields, opened.identity, job.found.inputs, job.run_id, opened.setup
    )
    job.run_dir.write_manifest({**manifest, "ignored": job.found.ignored})


def _note_start(job: _Job, load_s: float) -> None:
    spec, found = job.spec, job.found
    inputs = tuple(map(printable, spec.inputs))
    start = Start(time.time(), load_s, inputs, spec.limit, found.total, found.resumed)
    job.run_dir.add_start(start)


def _decoded(job: _Job, opened: Opened, tick: Tick) -> Tick:
    """Give every item that has none a row, and return the last tick."""
    job.run_dir.withdraw_output()
    tick = replace(tick, stage="decode")
    job.observe(tick)

    def tell(doing: str) -> None:
        job.observe(replace(tick, outcome=None, doing=doing))

    auditor = _auditor(job, opened, tell)
    with ExitStack() as stack:
        stack.callback(opened.keep_learnt)
        attempts = stack.enter_context(_attempts(job, opened))
        if opened.tell_lost is not None:
            opened.tell_lost(attempts.lose)
        for outcome in _outcomes(job, opened, attempts, auditor):
            _append(job, outcome)
            job.budget.add(outcome)
            tick = tick.after(outcome, opened.gauge())
            job.observe(tick)
    if job.found.num_to_do:
        _explain_missing_rows(job, tick)
    return replace(tick, outcome=None, audit_s=auditor.seconds if auditor else None)


def _auditor(job: _Job, opened: Opened, tell: Callable[[str], None]) -> Auditor | None:
    """Set up what compares answers with the baseline; None: nobody asked for it.

    Args:
        job: of which.
        opened: what decodes it.
        tell: is told what it is at; between two rows that may be minutes.
    """
    spec = job.spec
    if not spec.audited_share:
        return None
    if opened.baseline is None:
        raise UsageError("verify_greedy: this engine has no baseline; leave it out.")

    def claims(item: Item, row: AnswerRow) -> list[Claim] | Failure:
        return claims_of(item, row, spec, opened.render, opened.context_length)

    divergence = divergence_of(job.run_dir.manifest())
    plain = opened.baseline("engine")

    def generate(stream: Iterable[Request | Failure]) -> Iterator[Outcome]:
        tell("comparing with plain decoding")
        return plain.generate(stream)

    baseline = plain._replace(generate=generate)
    return Auditor(spec, baseline, claims, divergence, opened.slots, opened.leave_out)


def _attempts(job: _Job, opened: Opened) -> Attempts:
    learnt, path, fsync_every = job.learnt, job.run_dir.attempts, job.spec.fsync_every
    return Attempts(
        *(path, job.journal.size, learnt),
        slots=opened.slots,
        fsync_every=fsync_every,
        is_fleet=opened.tell_lost is not None,
    )


def _outcomes(
    job: _Job, opened: Opened, attempts: Attempts, auditor: Auditor | None
) -> Iterator[Outcome]:
    """Answer what has no row: one at a time what may have crashed the last start, then the rest."""

    def answered(stream: Iterable[Request | Failure]) -> Iterator[Outcome]:
        outcomes = answer(job.spec, opened, iter(stream), partial(_admits, job, attempts))
        return outcomes if auditor is None else auditor.verified(outcomes)

    for request in _suspected(job, opened):
        yield from answered([request])
    yield from answered(_requests(job, opened))


def _suspected(job: _Job, opened: Opened) -> Iterator[Request | Failure]:
    """Pick out the items that may have crashed the last start."""
    if not job.learnt.suspects:
        return
    for request in _requests(job, opened):
        suspect = job.learnt.suspect_of(request.item)
        if suspect is not None:
            yield poison(request.item) if suspect.crashes >= MOST_CRASHES else request


def _requests(job: _Job, opened: Opened) -> Iterator[Request | Failure]:
    """Read and map the records that have no row yet."""
    for record in read(job.sources, job.found.part, job.spec.samples):
        if not job.found.is_to_do(item_of(record).index):
            continue
        if isinstance(record, Failure):
            yield record
        else:
            yield ask(job.spec, opened, record)


def _admits(job: _Job, attempts: Attempts, item: Item) -> bool:
    """Write an item down before it is generated, unless the run was asked to stop."""
    if job.stop() or not job.budget.allows_one_more():
        return False
    attempts.admit(item)
    return True


def _append(job: _Job, outcome: Outcome) -> None:
    item = outcome.item
    if not job.found.is_to_do(item.index):
        raise DsparkBatchError(f"{item.where}: the engine answered this item twice; report this.")
    now = round(time.time(), 3)
    entry = Entry(item.index, item.where, item.digest, row_of(outcome), now)
    job.found.add(item.index, job.journal.append(entry))


def _explain_missing_rows(job: _Job, tick: Tick) -> None:
    """Tell a stop and an input that shrank while it was read from an engine that lost an item."""
    if job.stop():
        raise Resumable(
            f"{job.spec.out}: stopped as asked, {job.found.num_to_do} items are left; "
            "the same command continues."
        )
    if job.budget.is_spent:
        raise Resumable(
            f"{job.spec.out}: the time is up with {tick.done} of {tick.total} rows finished. Run "
            "the same command to go on."
        )
    records = sum(count_records(source) for source in job.sources)
    if records < job.found.part.stop:
        raise changed_input(job.sources[-1].name)
    raise DsparkBatchError(
        f"{job.spec.out}: {job.found.num_to_do} items went into the engine and did not "
        "come out; report this, and run the same command again."
    )


def _finished(job: _Job, tick: Tick, setup: SetupJson | None = None, **times: float) -> Report:
    """Write the output and the report.

    Args:
        job: of which every item has a row.
        tick: the last one.
        setup: with which this start decoded; None: as the first one did, if this one did at all.
        times: how long this start took, as the report has it.
    """
    job.observe(replace(tick, stage="finish"))
    job.run_dir.withdraw_output()
    manifest, gauge = job.begun(), tick.gauge
    rows = Rows(job.sources, job.journal, job.found)
    report = finish(
        job.run_dir,
        manifest,
        rows,
        job.spec,
        setup=setup or manifest["setup"],
        resumed=tick.resumed,
        new_tokens=tick.new_tokens,
        **times,
        prefill_s=gauge and gauge.prefill_s,
        round_s=gauge and gauge.round_s,
        draft_s=gauge and gauge.draft_s,
        verify_s=gauge and gauge.verify_s,
        idle_s=gauge and gauge.idle_s,
        audit_s=tick.audit_s,
        peak_memory_bytes=gauge and gauge.peak_memory_bytes,
        workers=gauge.workers if gauge else (),
    )
    _warn_of_growth(job)
    return report
