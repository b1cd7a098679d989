"""Look at a job, running or not, without touching it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from dspark_batch.errors import UsageError
from dspark_batch.intake.reader import locate
from dspark_batch.output.finish import Rows
from dspark_batch.record.formats import Manifest
from dspark_batch.record.journal import Journal
from dspark_batch.record.named_columns import wanted_columns
from dspark_batch.record.run_dir import RunDir, Start
from dspark_batch.record.survey import Survey, survey
from dspark_batch.spec.spec import Spec


class Look(NamedTuple):
    """A job as its run directory tells it."""

    run_dir: RunDir
    manifest: Manifest
    spec: Spec  # of the last start
    starts: Sequence[Start]

    @property
    def run_id(self) -> str:
        """What seeds the journal."""
        return self.manifest["run_id"]

    @contextmanager
    def rows(self) -> Iterator[Rows]:
        """Join the rows that there are with the input, which is read again.

        Raises:
            UsageError: an input is gone.
        """
        with self.surveyed() as (_, rows):
            yield rows

    @contextmanager
    def surveyed(self) -> Iterator[tuple[Survey, Rows]]:
        """Give the rows, and what was found when the input was read.

        Raises:
            UsageError: an input is gone.
            JournalError: the journal is damaged.
        """
        sources = locate(
            self.spec.inputs, self.run_dir.stdin, self.run_dir.fetched, wanted_columns(self.spec)
        )
        with Journal(self.run_dir.rows, self.run_id, read_only=True) as journal:
            # A failure that waits to run again is a row all the same.
            spec = replace(self.spec, retry_failed=False, retry_where=())
            found = survey(sources, spec, journal)
            yield found, Rows(sources, journal, found)


def look(out: str, *, trust_remote_code: bool = False) -> Look:
    """Find the job of an output.

    Args:
        out: of a job.
        trust_remote_code: let its target run Python code of its own. What the run directory says
            of it does not count: that may come from somebody else.

    Raises:
        UsageError: there is none.
    """
    run_dir = RunDir(out)
    manifest = run_dir.manifest()
    if manifest is None:
        raise UsageError(f"{run_dir.path}: no job here. Name the --out of a run.")
    starts = run_dir.starts()
    # Through JSON a tuple became a list.
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in manifest["spec"].items()
    }
    spec = Spec(**fields | {"trust_remote_code": trust_remote_code})
    if starts:
        spec = replace(spec, inputs=tuple(starts[-1].inputs), limit=starts[-1].limit)
    return Look(run_dir, manifest, spec, starts)
