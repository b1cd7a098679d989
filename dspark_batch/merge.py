"""Join the outputs of all shards of a job to the output that one process would have written.

What comes out is a job of its own: it is verified, shown, exported and continued like any other.
"""

import shutil
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, zip_longest

from dspark_batch.errors import Resumable, ResumeMismatch, UsageError
from dspark_batch.intake import remote
from dspark_batch.intake.reader import fetch, item_of, locate, printable, read
from dspark_batch.output.finish import Rows, changed_input, finish
from dspark_batch.output.look import Look, look
from dspark_batch.output.report import Report
from dspark_batch.output.status import status
from dspark_batch.record.disk import full_disk_is_resumable
from dspark_batch.record.formats import InputJson, Manifest
from dspark_batch.record.journal import Journal
from dspark_batch.record.named_columns import wanted_columns
from dspark_batch.record.run_dir import (
    RunDir,
    Start,
    check_out,
    differences,
    new_manifest,
    new_run_id,
    run_dir_of,
)
from dspark_batch.record.survey import Survey, describe
from dspark_batch.spec.shard import Shard
from dspark_batch.spec.spec import STDOUT
from dspark_batch.types import Item, Json

_ROWS_PER_FSYNC = 1000  # all of them are still in the shards


def merge(out: str, shards: Sequence[str], *, overwrite: bool = False) -> Report:
    """Write the output of a job whose shards are all finished, and return its report.

    The shards stay as they are. Until the output is there, the same call begins again.

    Args:
        out: the output, *.parquet or *.jsonl; whatever the shards' are.
        shards: their outputs or run directories, in any order.
        overwrite: discard the job and the output that are there.

    Raises:
        UsageError: a shard is missing, named twice, or none; the output is there, or an input gone.
        ResumeMismatch: the shards are not of one job: other options, models, numerics, or inputs.
        Resumable: a shard is not finished, or the disk is full.
        JournalError: the journal of a shard is damaged.
    """
    jobs = _in_order([look(str(run_dir_of(name).out)) for name in shards])
    for job in jobs[1:]:
        _refuse_another(jobs[0], job)
    if out == STDOUT:
        raise UsageError("-o -: a merge writes a file; name one.")
    merged = _Merge(jobs, out)
    with merged.run_dir.lock():
        return merged.written(overwrite=overwrite)


def _shard_of(job: Look) -> Shard:
    if job.spec.part is None:
        raise UsageError(
            f"{job.run_dir.out}: is no shard, but a whole job; name the outputs of `run --shard`."
        )
    return job.spec.part


def _in_order(jobs: Sequence[Look]) -> list[Look]:
    """Put the shards in order, which must be all, each once, and finished."""
    job_by_number: dict[int, Look] = {}
    for job in jobs:
        shard, first = _shard_of(job), _shard_of(jobs[0])
        if shard.count != first.count:
            raise UsageError(
                f"{jobs[0].run_dir.out} is shard {first} and {job.run_dir.out} is shard {shard}; "
                "name shards of one count."
            )
        known = job_by_number.setdefault(shard.number, job)
        if known is not job:
            raise UsageError(
                f"{known.run_dir.out} and {job.run_dir.out} are both shard {shard}; name one."
            )
    count = _shard_of(jobs[0]).count
    if missing := [str(Shard(n, count)) for n in range(1, count + 1) if n not in job_by_number]:
        is_one = len(missing) == 1
        raise UsageError(
            f"shard{'' if is_one else 's'} {', '.join(missing)} {'is' if is_one else 'are'} "
            "missing; name the outputs of all."
        )
    if unfinished := [_progress(job) for job in jobs if not job.run_dir.has_output()]:
        raise Resumable(
            f"not finished: {'; '.join(unfinished)}. Run their commands to the end, then merge."
        )
    return [job_by_number[number] for number in sorted(job_by_number)]


def _progress(job: Look) -> str:
    found = status(str(job.run_dir.out))
    of = "" if found.total is None else f" of {found.total}"
    held = f", held by {found.holder}" if found.holder else ""
    return f"shard {job.spec.shard} ({job.run_dir.out}, {found.done}{of} rows{held})"


def _refuse_another(first: Look, job: Look) -> None:
    """Refuse a shard of another job.

    Raises:
        ResumeMismatch: naming each thing that differs, and both values.
    """
    words = (f"in {first.run_dir.out}", f"in {job.run_dir.out}")
    known, others = (each.manifest["fingerprint"]["fields"] for each in (first, job))
    fields = {**dict.fromkeys(known), **others, "shard": first.spec.shard}
    found = differences(first.manifest, fields, words, job.manifest["setup"])
    ours, theirs = _asked(first), _asked(job)
    found += [
        f"{name} is {value} {words[0]} and {theirs.get(name)} {words[1]}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if found:
        raise ResumeMismatch(
            f"these are no shards of one job: {'; '.join(found)}. Run the other one again with "
            "--overwrite and the same options."
        )


def _asked(job: Look) -> dict[str, Json]:
    """Say of which records a job has how many rows."""
    inputs = job.run_dir.inputs() or ()
    files = {f"input {number}": _named(each) for number, each in enumerate(inputs, 1)}
    return {"limit": job.spec.limit, "samples": _samples_of(job), "inputs": len(inputs), **files}


def _named(file: InputJson | None) -> str:
    return "no file" if file is None else f"{file['path']} with SHA-256 {file['sha256'][:12]}…"


def _samples_of(job: Look) -> int:
    """Look up how many rows each record has, which a later start may have changed."""
    report = job.run_dir.report()
    return job.spec.samples if report is None else report["samples"]


class _Merge:
    """The job that the shards come to."""

    def __init__(self, jobs: Sequence[Look], out: str) -> None:
        self._jobs = jobs
        self._first = jobs[0]
        self._spec = replace(jobs[0].spec, out=out, shard=None, samples=_samples_of(jobs[0]))
        self.run_dir = RunDir(out)
        if any(job.run_dir.path == self.run_dir.path for job in jobs):
            raise UsageError(f"{out}: is one of the shards; choose another output.")
        there = self._first.run_dir
        self._sources = locate(
            self._spec.inputs, there.stdin, there.fetched, wanted_columns(self._spec)
        )
        check_out(self.run_dir, self._sources)

    def written(self, *, overwrite: bool) -> Report:
        """Write all of the job, or leave nothing of it."""
        self._check_inputs()
        self._clear(overwrite=overwrite)
        try:
            return self._written()
        except BaseException:
            self.run_dir.discard()
            raise

    def _check_inputs(self) -> None:
        """Make sure that the inputs are what the shards read."""
        fetch(self._sources)
        found, known = map(describe, self._sources), self._first.run_dir.inputs() or ()
        for here, there in zip_longest(found, known):
            if here != there:
                raise ResumeMismatch(
                    f"the input is not what the shards read: {_named(here)} is here, and they read "
                    f"{_named(there)}. Put that back, or run the shards again."
                )

    def _clear(self, *, overwrite: bool) -> None:
        """Make room for the job; unasked only where no job has begun, or a merge was killed."""
        run_dir = self.run_dir
        if not overwrite:
            if run_dir.out.exists() or run_dir.starts():
                raise UsageError(
                    f"{run_dir.out}: a job or an output is here; choose another output, or replace "
                    "it with --overwrite."
                )
            if run_dir.url is not None:
                remote.refuse_taken(run_dir.url, overwrite=False)
        run_dir.discard()

    def _written(self) -> Report:
        there, here = self._first.run_dir, self.run_dir
        manifest = self._manifest()
        with full_disk_is_resumable(here.path):
            if there.stdin.exists():
                shutil.copyfile(there.stdin, here.stdin)
            if there.fetched.exists():
                shutil.copytree(there.fetched, here.fetched)
            opened = Journal(here.rows, manifest["run_id"], fsync_every=_ROWS_PER_FSYNC)
        with opened as journal:
            found = self._joined(journal, manifest)
            here.write_manifest(manifest)
            rows = Rows(self._sources, journal, found)
            report = finish(
                here,
                manifest,
                rows,
                self._spec,
                setup=manifest["setup"],
                resumed=0,
                new_tokens=0,
            )
        names = tuple(map(printable, self._spec.inputs))
        here.add_start(Start(time.time(), 0.0, names, self._spec.limit, found.total, found.total))
        return report

    def _manifest(self) -> Manifest:
        """Describe the job as the first shard began it, but whole."""
        first = self._first.manifest
        fields = {**first["fingerprint"]["fields"], "shard": None}
        inputs = self._first.run_dir.inputs() or ()
        told = (self._spec, fields, first["identity"], inputs, new_run_id(), first["setup"])
        return {
            **new_manifest(*told),
            "created": min(job.manifest["created"] for job in self._jobs),
            "versions": first["versions"],
            "platform": first["platform"],
            "ignored": first.get("ignored", {}),
            "shards": [job.run_id for job in self._jobs],
        }

    def _joined(self, journal: Journal, manifest: Manifest) -> Survey:
        """Copy the row of each record out of the shard that has it."""
        inputs, samples = tuple(manifest["inputs"]), self._spec.samples
        records = sum(each["records"] for each in inputs)
        whole = self._spec.part_of(records)
        offsets = array("q")
        items = map(item_of, read(self._sources, whole, samples))
        for job in self._jobs:
            num_rows = len(job.spec.part_of(records)) * samples
            with Journal(job.run_dir.rows, job.run_id, read_only=True) as theirs:
                for item in islice(items, num_rows):
                    offsets.append(_copied(item, theirs, journal, job))
        if len(offsets) < len(whole) * samples:
            raise changed_input(self._sources[-1].name)
        return Survey(inputs, whole, offsets, 0, 0, manifest["ignored"])


def _copied(item: Item, theirs: Journal, ours: Journal, job: Look) -> int:
    """Copy the row of an item, and return where it is now."""
    found = theirs.claim(item, _as_it_is)
    if found is None:
        raise UsageError(
            f"{item.where}: has no row in {job.run_dir.rows}, where shard {job.spec.shard} must "
            "have one; run the command of that shard again."
        )
    entry = theirs.read(found.offset)
    return ours.append(replace(entry, index=item.index, where=item.where))


def _as_it_is(failure: Mapping[str, Json]) -> bool:
    """Leave a failure what it is."""
    return False
