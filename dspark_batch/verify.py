"""Audit a run: recompute all that can be, and decode answers again without drafts.

    manifest -> inputs -> journal -> output and report -> models -> rows -> replay

What a step finds stops those behind it only if they would rest on it.
"""

import heapq
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import cast

from dspark_batch.audit.audit_log import AuditLog, row_digest
from dspark_batch.audit.output_audit import output_problems
from dspark_batch.audit.replay import (
    Against,
    Baseline,
    Claim,
    Difference,
    claims_of,
    divergence_of,
    replay,
)
from dspark_batch.audit.row_audit import Reading, misfit, row_problems
from dspark_batch.errors import EqualityError, JournalError, UsageError
from dspark_batch.fleet.opener import open_fleet
from dspark_batch.intake.reader import Source, item_of
from dspark_batch.opening import Opened, OpenEngine, open_pair
from dspark_batch.output.finish import Rows, write_output
from dspark_batch.output.look import Look, look
from dspark_batch.output.report import COUNTS, Report, Tick
from dspark_batch.record.formats import AuditJson, FindingJson, Manifest, Verdict
from dspark_batch.record.journal import scan
from dspark_batch.record.run_dir import (
    RunDir,
    differences,
    fingerprint,
    is_as_written,
    run_dir_of,
    versions,
)
from dspark_batch.record.survey import Survey
from dspark_batch.spec.share import draw
from dspark_batch.spec.spec import Auto, Spec
from dspark_batch.types import Failure, Item

_MOST_KEPT = 100  # findings of one kind; the others are counted

Observe = Callable[[Tick], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not agree with what it was made from."""

    kind: str  # which step found it: manifest, inputs, journal, output, report, models, rows
    says: str


@dataclass(slots=True, kw_only=True)
class Audit:
    """What an audit looked at, and what it found."""

    out: str
    against: Against
    strict: bool  # near-ties with mlx-lm fail, too
    rows: int = 0  # that there are
    answers: int = 0  # of these
    replayed: int = 0  # answers that were decoded again, those before an interruption included
    left_out: Counter[str] = field(default_factory=Counter)  # why -> answers
    looked_at: dict[str, int] = field(default_factory=dict)  # step -> how many things
    wrong: Counter[str] = field(default_factory=Counter)  # step -> how many of them
    findings: list[Finding] = field(default_factory=list)  # the first ones of each step
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0  # of the replay, in this process

    @property
    def failing(self) -> list[Difference]:
        """The differences that fail the audit: all, or the defects only."""
        if self.against == "engine" or self.strict:
            return self.differences
        return [each for each in self.differences if each.verdict == "defect"]

    @property
    def verdict(self) -> Verdict:
        """What it comes to, in a word or two."""
        if self.wrong:
            return "damaged"
        if self.failing:
            return "different"
        return "near-ties only" if self.differences else "equal"

    @property
    def exit_code(self) -> int:
        """0: all agrees; 3: something does not."""
        return EqualityError.exit_code if self.wrong or self.failing else 0

    def to_json(self) -> AuditJson:
        """Give what audit.json holds."""
        told: list[FindingJson] = [
            cast("FindingJson", asdict(each) | {"says": str(each)}) for each in self.differences
        ]
        return {
            "out": self.out,
            "against": self.against,
            "strict": self.strict,
            "rows": self.rows,
            "answers": self.answers,
            "replayed": self.replayed,
            "left_out": dict(self.left_out),
            "looked_at": self.looked_at,
            "wrong": dict(self.wrong),
            "findings": [{"kind": each.kind, "says": each.says} for each in self.findings],
            "differences": told,
            "seconds": self.seconds,
            "verdict": self.verdict,
        }

    def see(self, step: str, count: int, says: Iterable[str]) -> bool:
        """Note what a step looked at and found; return whether all of it was right."""
        if count:
            self.looked_at[step] = self.looked_at.get(step, 0) + count
        is_right = True
        for sentence in says:
            is_right = False
            self.wrong[step] += 1
            if self.wrong[step] <= _MOST_KEPT:
                self.findings.append(Finding(step, sentence))
        return is_right


def _ignore(tick: Tick) -> None:
    """Watch nothing."""


def verify(  # noqa: PLR0913  each is an option of the command
    out: str,
    *,
    sample: int | None = None,
    slots: int | None = None,
    workers: int | Auto | None = None,
    against: Against = "engine",
    strict: bool = False,
    trust_remote_code: bool = False,
    observe: Observe = _ignore,
    open_engine: OpenEngine | None = None,
) -> Audit:
    """Audit the rows that a run has, finished or not, and write `OUT.run/audit.json`.

    Interrupted, the same call goes on behind the answers that it has replayed.

    Args:
        out: the output of the run, or its run directory.
        sample: how many answers to decode again, drawn by what their items are; None: all.
        slots: answers that are decoded together; None: as many as the run had.
        workers: processes of this machine that decode, as a run has them; None: this one.
        against: our engine without a drafter, or mlx-lm's own generation.
        strict: with mlx-lm, near-ties fail as well.
        trust_remote_code: let the target run Python code of its own, as the run may have done.
        observe: called before models are loaded and after every replayed answer.
        open_engine: loads the pair, `open_pair` by default.

    Raises:
        UsageError: there is no such run, or an input of it is gone.
        ModelError: the pair cannot be loaded.
        OutputInUse: the run is going on.
        EqualityError: the manifest cannot be read, so nothing can be audited.
    """
    run_dir = run_dir_of(out)
    try:
        manifest = run_dir.manifest()
    except JournalError as error:
        raise EqualityError(str(error)) from error
    if manifest is None:
        raise UsageError(f"{run_dir.path}: no job here. Name the --out of a run.")
    audit = Audit(out=str(run_dir.out), against=against, strict=strict)
    with run_dir.lock():
        if audit.see("manifest", 1, _manifest_problems(run_dir, manifest)):
            job = look(audit.out, trust_remote_code=trust_remote_code)
            here = replace(job.spec, worker_resources=None, ray=None, workers=workers)
            job = job._replace(spec=replace(here, slots=slots or job.spec.slots))
            if open_engine is None:
                open_engine = open_fleet if here.is_fleet else open_pair
            _Verification(job, audit, sample, observe, open_engine).run()
        run_dir.write_audit(audit.to_json())
    return audit


def _manifest_problems(run_dir: RunDir, manifest: Manifest) -> Iterator[str]:
    if not is_as_written(manifest):
        yield (
            f"{run_dir.path}/manifest.json was edited: its SHA-256 is not the one in it. Nothing "
            "else was looked at, because all of it rests on the settings there"
        )


@dataclass(frozen=True, slots=True)
class _Verification:
    """The steps behind the manifest."""

    job: Look
    audit: Audit
    sample: int | None
    observe: Observe
    open_engine: OpenEngine

    def run(self) -> None:
        try:
            with self.job.surveyed() as (found, rows):
                self._look_at(found, rows)
        except JournalError as error:
            self.audit.see("journal", 1, [str(error)])

    def _look_at(self, found: Survey, rows: Rows) -> None:
        audit, job = self.audit, self.job
        audit.rows = len(rows)
        if not audit.see("rows", 0, _misfits(rows)):
            return  # what cannot be read as a row can be compared with nothing
        is_input_right = audit.see("inputs", len(found.inputs), _input_problems(job, found))
        if is_input_right:  # else rows would be missed that no record asks for any more
            audit.see("journal", len(rows), _journal_problems(job, found, rows))
        if is_input_right and job.run_dir.out.exists():
            audit.see("output", len(rows), _output_problems(job, rows))
            audit.see("report", 1, _report_problems(job, rows))
        if not rows:
            return
        self.observe(Tick("load", len(rows), 0, 0, 0))
        opened = self.open_engine(job.spec, job.manifest)
        with ExitStack() as stack:
            stack.callback(opened.close)
            if audit.see("models", 1, _model_problems(job, opened)):
                self._read_rows(rows, opened)

    def _read_rows(self, rows: Rows, opened: Opened) -> None:
        """Check each row by itself, choose who is replayed, and replay."""
        if opened.baseline is None:
            raise UsageError("verify: this engine has no baseline to compare with.")
        baseline = opened.baseline(self.audit.against)
        reading = Reading(
            self.job.spec,
            opened.render,
            opened.context_length,
            baseline.decode,
            baseline.stop_ids,
            baseline.split,
        )
        replayable = []
        for record, entry in rows.recorded():
            item = item_of(record)
            problems = row_problems(record, entry.row, reading)
            self.audit.see("rows", 1, (f"{_name(item)}: {each}" for each in problems))
            if entry.row["status"] == "succeeded":
                replayable.append((draw(item), item.index))
        self.audit.answers = len(replayable)
        chosen = heapq.nsmallest(
            len(replayable) if self.sample is None else self.sample, replayable
        )
        self._replay(rows, reading, baseline, {index for _, index in chosen})

    def _replay(self, rows: Rows, reading: Reading, baseline: Baseline, chosen: set[int]) -> None:
        """Decode the chosen answers again, and note each as soon as it is compared."""
        began = time.monotonic()
        job, audit = self.job, self.audit
        with AuditLog(job.run_dir.audited, _subject(job, audit.against)) as log:
            asked = self._asked(rows, reading, chosen, log)
            for digest, difference in replay(baseline, asked, divergence_of(job.manifest)):
                log.add(digest, difference)
                self._count(difference)
                self.observe(Tick("decode", len(chosen), audit.replayed, len(audit.differences), 0))
            log.discard()
        audit.see("replay", audit.replayed, ())
        audit.seconds = time.monotonic() - began

    def _asked(
        self, rows: Rows, reading: Reading, chosen: set[int], log: AuditLog
    ) -> Iterator[tuple[str, list[Claim]]]:
        """Yield what the chosen rows claim; those that were compared before are only counted."""
        for record, entry in rows.recorded():
            item = item_of(record)
            if item.index not in chosen or entry.row["status"] != "succeeded":
                continue
            digest = row_digest(item, entry.row)
            claims = claims_of(
                item, entry.row, reading.spec, reading.render, reading.context_length
            )
            if isinstance(claims, Failure):
                continue  # a finding of the rows' own step
            if why := _why_not(claims, reading.spec, self.audit.against):
                self.audit.left_out[why] += 1
            elif digest in log:
                self._count(log.found(digest))
            else:
                yield digest, claims

    def _count(self, difference: Difference | None) -> None:
        self.audit.replayed += 1
        if difference is not None:
            self.audit.differences.append(difference)


def _subject(job: Look, against: Against) -> dict[str, object]:
    """Name what is compared with what, so that an audit goes on with its own comparisons only."""
    fields = job.manifest["fingerprint"]["fields"]
    return {"against": against, "fields": fields, "versions": versions()}


def _why_not(claims: Sequence[Claim], spec: Spec, against: Against) -> str | None:
    """Say why answers cannot be decoded again; None: they can."""
    samplings = [claim.request.sampling for claim in claims]
    if against == "mlx-lm" and any(claim.request.given is not None for claim in claims):
        return "scored, which mlx-lm's generation does not do"
    if against == "mlx-lm" and any(sampling.is_own_way for sampling in samplings):
        return "with penalties, biases, a grammar or other ends, which are none of mlx-lm's"
    if all(sampling.is_greedy for sampling in samplings):
        return None
    if spec.sampling == "rejection":
        return "drawn by the rejection rule, by which an answer depends on the drafts"
    return "sampled, which mlx-lm does with other noise" if against == "mlx-lm" else None


def _misfits(rows: Rows) -> Iterator[str]:
    for item, entry in rows.answered():
        if problem := misfit(entry.row):
            yield f"{_name(item)}: {problem}"


def _name(item: Item) -> str:
    sample = f", sample {item.sample_index}" if item.sample_index else ""
    return f"{item.where} (custom_id {item.custom_id}{sample})"


def _input_problems(job: Look, found: Survey) -> Iterator[str]:
    """Compare the inputs with those of the output; without one, with those of the first start."""
    known = {file["path"]: file for file in job.run_dir.inputs() or job.manifest["inputs"]}
    for file in found.inputs:
        expected = known.get(file["path"])
        if expected is not None and dict(file) != dict(expected):
            yield (
                f"{file['path']} is not what the job read: {file['records']} records with SHA-256 "
                f"{file['sha256'][:12]}…, expected {expected['records']} with "
                f"{expected['sha256'][:12]}…"
            )


def _journal_problems(job: Look, found: Survey, rows: Rows) -> Iterator[str]:
    """Find records without a row, where all must have one, and rows for one record twice."""
    if job.run_dir.out.exists():
        for record in rows.records():
            item = item_of(record)
            if found.is_to_do(item.index):
                yield f"{_name(item)}: has no row in the journal"
    answered: set[int] = set()
    with job.run_dir.rows.open("rb") as stream:
        for number, line in enumerate(scan(stream, job.run_id, str(job.run_dir.rows)), 1):
            row, entry = line.entry.row, line.entry
            key = hash((row["custom_id"], entry.digest, row["sample_index"], entry.index))
            if key in answered:
                yield f"rows.jsonl:{number}: a second row for {entry.where}, which had its answer"
            if row["status"] == "succeeded":  # what failed may run again
                answered.add(key)


def _output_problems(job: Look, rows: Rows) -> Iterator[str]:
    """Write the output again, and compare."""
    out = job.run_dir.out
    begun = datetime.fromisoformat(job.manifest["created"])
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".verify-") as place:
        remade = Path(place, f"rows{out.suffix}")
        write_output(remade, rows, job.spec, begun).replace(remade)
        try:
            yield from (
                f"{out}: {each}"
                for each in output_problems(Source(str(out), out), Source(str(out), remade))
            )
        except UsageError as error:
            yield str(error)


def _report_problems(job: Look, rows: Rows) -> Iterator[str]:
    saved = job.run_dir.report()
    if saved is None:
        yield f"{job.run_dir.path}/report.json is gone, but the output is there"
        return
    counted = Report.of_rows(rows, out=job.spec.out, resumed=0, new_tokens=0)
    for name in COUNTS:
        if saved.get(name) != getattr(counted, name):
            yield f"report.json: {name} is {saved.get(name)}, expected {getattr(counted, name)}"


def _model_problems(job: Look, opened: Opened) -> Iterator[str]:
    fields = fingerprint(job.spec, opened.identity, opened.context_length)
    fields.pop("drafting", None)  # no answer is decoded again where drafts decide
    for difference in differences(job.manifest, fields):
        yield f"another model or setting than the job had: {difference}"
