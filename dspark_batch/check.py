"""Check a job before its night: every record, without the weights."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from dspark_batch.errors import UsageError
from dspark_batch.intake.mapping import Render, to_request
from dspark_batch.intake.prompts import Prompts
from dspark_batch.intake.reader import STDIN, Source, fetch, item_of, locate, read
from dspark_batch.output.status import Status, status
from dspark_batch.record.formats import Manifest
from dspark_batch.record.journal import Found, Journal, Retries
from dspark_batch.record.named_columns import wanted_columns
from dspark_batch.record.run_dir import RunDir, check_out, check_resume, refuse_another_job
from dspark_batch.record.survey import Survey, most_bytes, survey
from dspark_batch.spec.share import is_in_share
from dspark_batch.spec.spec import Spec, number_or_none
from dspark_batch.types import Failure, Item

_FIRST_FAILURES = 3


class Reads(NamedTuple):
    """What is known of a model without its weights."""

    render: Render
    decode: Callable[[tuple[int, ...]], str]
    context_length: int
    identity: Mapping[str, str | None]
    weight_bytes: int | None = None  # None: not all of them are here
    # Bytes of the target's cache for a position, and for a slot besides; None: unknown.
    cached_bytes: tuple[int, int] | None = None


OpenReading: TypeAlias = Callable[[Spec], Reads]


class Example(NamedTuple):
    """A prompt as the model will see it."""

    where: str
    tokens: int
    text: str


@dataclass(slots=True)
class Check:
    """What a run would find."""

    out: str
    samples: int
    slots: int | None  # None: the start chooses them
    context_length: int
    prompts: Prompts = field(default_factory=Prompts)
    records: int = 0
    without_request: Counter[str] = field(default_factory=Counter)  # error.code -> records
    first_failures: list[str] = field(default_factory=list)
    has_failures: bool = False  # what the job says to skip is none
    examples: list[Example] = field(default_factory=list)
    total: int = 0  # rows of the job
    resumed: int = 0  # of these, how many are there already
    holder: str | None = None  # the process that runs this job now; None: nobody does
    has_job: bool = False  # the run directory holds one, and its settings are these
    seconds: float | None = None  # that are left; None: nobody measured it
    audited: int = 0  # rows that are decoded again without drafts
    audit_seconds: float | None = None  # of them; None: nobody measured it
    weight_bytes: int | None = None
    slot_bytes: int | None = None  # most that the cache of one slot takes; None: unknown
    disk_bytes: int = 0  # that journal and output may still grow by
    disk_is_measured: bool = False  # else it is the most that could be
    free_bytes: int = 0
    hints: tuple[str, ...] = ()  # what the columns suggest
    ignored: Mapping[str, int] = field(default_factory=dict)  # field left aside -> records

    @property
    def exit_code(self) -> int:
        """The one that the run would end with: 1 if there will be failure rows, else 0."""
        return 1 if self.has_failures else 0


def open_reading(spec: Spec) -> Reads:
    """Load the tokenizer and the configs of a pair."""
    from dspark_batch.models.pairs import drafter_for
    from dspark_batch.models.thinking import settle_thinking
    from dspark_batch.pair import load_reading

    drafts = spec.draft_length != 0
    found = load_reading(
        spec.family,
        target=spec.target,
        drafter=drafter_for(spec.family, spec.target, spec.drafter, drafts=drafts),
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
    )
    tokenizer = found.tokenizer
    thinking = settle_thinking(tokenizer, spec.thinking, spec.family, spec.target, spec.drafter)
    identity = found.identity | {"thinking": thinking.choice}
    return Reads(
        thinking.render,
        tokenizer.decode,
        found.context_length,
        identity,
        found.weight_bytes,
        found.cached_bytes,
    )


def check(spec: Spec, *, examples: int = 1, open_reading: OpenReading = open_reading) -> Check:
    """Read, map and count every record as a run would, and write nothing.

    Args:
        spec: the job.
        examples: how many of the first prompts to render.
        open_reading: loads the tokenizer.

    Raises:
        DsparkBatchError: the run could not begin; the class and the message are those of `run`.
    """
    if STDIN in spec.inputs:
        raise UsageError("-: check reads its input more than once; save it to a file first.")
    run_dir = RunDir(spec.out)
    sources = locate(spec.inputs, run_dir.stdin, run_dir.fetched, wanted_columns(spec))
    check_out(run_dir, sources)
    manifest = None if spec.overwrite else run_dir.manifest()
    if not spec.overwrite:
        check_resume(spec, run_dir, manifest)
    fetch(sources)
    found = _survey(sources, spec, run_dir, manifest)
    reads = open_reading(spec)
    known = {**reads.identity, "context_length": reads.context_length}
    if manifest is not None:
        refuse_another_job(run_dir, manifest, known)
    slots = number_or_none(spec.slots) or _planned_slots(manifest)
    result = Check(spec.out, spec.samples, slots, reads.context_length)
    result.has_job, result.holder = manifest is not None, run_dir.holder()
    result.total, result.resumed = found.total, found.resumed
    result.hints, result.ignored = found.hints, found.ignored
    for record in read(sources, found.part):
        _count(result, record, spec, reads, examples)
    result.audited = _count_audited(sources, spec, found)
    _estimate(result, spec, reads, found, status(spec.out) if manifest else None)
    return result


def _planned_slots(manifest: Manifest | None) -> int | None:
    """Look up the slots of the first start; None: there was none, or it did not plan."""
    setup = manifest and manifest["setup"]
    return setup["plan"]["slots"] if setup else None


class _NoRows:
    """The journal of a job that has not begun."""

    def claim(self, item: Item, retries: Retries) -> Found | None:
        return None


def _survey(
    sources: tuple[Source, ...], spec: Spec, run_dir: RunDir, manifest: Manifest | None
) -> Survey:
    if manifest is None or not run_dir.rows.exists():
        return survey(sources, spec, _NoRows())
    with Journal(run_dir.rows, manifest["run_id"], read_only=True) as journal:
        return survey(sources, spec, journal)


def _count(result: Check, record: Item | Failure, spec: Spec, reads: Reads, examples: int) -> None:
    result.records += 1
    result.prompts.see(item_of(record))
    asked = (
        to_request(record, spec, reads.render, reads.context_length)
        if isinstance(record, Item)
        else record
    )
    if isinstance(asked, Failure):
        result.without_request[asked.code] += 1
        result.has_failures |= not asked.is_skipped
        if len(result.first_failures) < _FIRST_FAILURES:
            result.first_failures.append(asked.message)
        return
    result.prompts.add(asked)
    if len(result.examples) < examples:
        ids = asked.prompt_ids
        result.examples.append(Example(asked.item.where, len(ids), reads.decode(ids)))


def _count_audited(sources: Sequence[Source], spec: Spec, found: Survey) -> int:
    """Count the items of the audited share that have no row yet."""
    if not spec.audited_share:
        return 0
    items = map(item_of, read(sources, found.part, spec.samples))
    return sum(found.is_to_do(i.index) and is_in_share(i, spec.audited_share) for i in items)


def _estimate(
    result: Check, spec: Spec, reads: Reads, found: Survey, before: Status | None
) -> None:
    """Estimate time from what this job showed, memory from the configs, disk from either."""
    to_do = result.total - result.resumed
    if before is not None and before.seconds_per_row is not None:
        result.seconds = to_do * before.seconds_per_row
        # A step of one token takes at most what a round takes, and commits less.
        steps_per_round = before.accept_length or 1.0
        result.audit_seconds = result.audited * before.seconds_per_row * steps_per_round
    result.weight_bytes = reads.weight_bytes
    if reads.cached_bytes is not None:
        per_position, per_slot = reads.cached_bytes
        positions = min(reads.context_length, result.prompts.longest + spec.max_tokens)
        result.slot_bytes = positions * per_position + per_slot
    result.disk_bytes = most_bytes(found, spec)
    if before is not None and before.done:
        row_bytes = RunDir(spec.out).rows.stat().st_size / before.done
        inputs = sum(each["bytes"] for each in found.inputs)
        result.disk_bytes = round(row_bytes * (to_do + result.total)) + inputs
        result.disk_is_measured = True
    result.free_bytes = shutil.disk_usage(_existing(RunDir(spec.out).out.absolute().parent)).free


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
