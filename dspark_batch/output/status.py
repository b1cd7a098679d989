"""Where a job stands, from what its run directory says; nothing is locked and nothing changed."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dspark_batch.output.look import Look, look
from dspark_batch.output.plan import plan_of
from dspark_batch.record.formats import TellingPlan
from dspark_batch.record.journal import Entry, scan
from dspark_batch.record.row_index import RowIndex, key_of
from dspark_batch.record.rows import committed_in, ratio

State = Literal["running", "stopped", "finished"]
_RECENT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A job at one moment. Speeds are those of the last start; None: it shows none yet."""

    out: str
    state: State
    holder: str | None  # the process that runs it; None: nobody does
    shard: str | None  # which part of a job this one is, "3/16"; None: all of it
    total: int | None  # rows of the job; None: its models were never loaded
    done: int
    failed: int
    starts: int
    new_tokens: int  # by the last start
    accept_length: float | None  # of the whole job
    last_row_at: float | None  # Unix time, s
    tokens_per_s: float | None
    recent_tokens_per_s: float | None  # in the last minute
    seconds_per_row: float | None
    remaining_s: float | None  # None: unknown, or nobody runs it
    plan: TellingPlan | None  # of the first start; None: there is none


def status(out: str, now: float | None = None) -> Status:
    """Describe the job of an output.

    Args:
        out: the output of a run.
        now: Unix time, s; None: now.

    Raises:
        UsageError: there is no such job.
    """
    job = look(out)
    holder = job.run_dir.holder()
    return _Count(job, time.time() if now is None else now).status(holder)


class _Count:
    """One pass over the journal."""

    def __init__(self, job: Look, now: float) -> None:
        self._job, self._now = job, now
        self._began = job.starts[-1].began if job.starts else now
        self._rows = RowIndex()  # by place: a later row for the same place replaces an earlier one
        self._committed = self._rounds = 0
        self._new_rows = self._new_tokens = self._recent_tokens = 0
        self._last: float | None = None
        for offset, entry in _entries(job):
            self._add(offset, entry)

    def _add(self, offset: int, entry: Entry) -> None:
        row, at = entry.row, entry.finished_at or 0.0
        place = key_of(entry.where, entry.digest, row["sample_index"])
        self._rows.add(place, 0, offset, failed=row["status"] == "errored")
        self._last = entry.finished_at
        is_new = at >= self._began
        self._new_rows += is_new
        if row["status"] != "succeeded":
            return
        tokens = row["usage"]["completion_tokens"]
        self._committed += committed_in(row)
        self._rounds += row["metrics"]["speculative_decoding"]["num_spec_steps"]
        self._new_tokens += tokens * is_new
        self._recent_tokens += tokens * (is_new and at >= self._now - _RECENT_S)

    def status(self, holder: str | None) -> Status:
        job, (done, failed) = self._job, self._rows.count()
        setup = job.manifest["setup"]
        total = job.starts[-1].total if job.starts else None
        # While it runs the clock goes on; then it stood still at the last row.
        until = self._now if holder else self._last or self._began
        worked_s = max(0.0, until - self._began)
        seconds_per_row = ratio(worked_s, self._new_rows)
        remaining_s = None
        if holder is not None and seconds_per_row is not None and total is not None:
            remaining_s = (total - done) * seconds_per_row
        return Status(
            out=job.spec.out,
            state="running" if holder else _rest(job),
            holder=holder,
            shard=job.spec.shard,
            total=total,
            done=done,
            failed=failed,
            starts=len(job.starts),
            new_tokens=self._new_tokens,
            accept_length=ratio(self._committed, self._rounds),
            last_row_at=self._last,
            tokens_per_s=ratio(self._new_tokens, worked_s) if self._new_tokens else None,
            recent_tokens_per_s=self._recent_tokens / min(_RECENT_S, worked_s)
            if holder and self._new_tokens and worked_s
            else None,
            seconds_per_row=seconds_per_row,
            remaining_s=remaining_s,
            plan=plan_of(setup) if setup else None,
        )


def _entries(job: Look) -> Iterator[tuple[int, Entry]]:
    if not job.run_dir.rows.exists():
        return
    with job.run_dir.rows.open("rb") as journal:
        for line in scan(journal, job.run_id, str(job.run_dir.rows)):
            yield line.offset, line.entry


def _rest(job: Look) -> State:
    return "finished" if job.run_dir.has_output() else "stopped"
