"""What drafters are compared on: greedy answers that ended by themselves, of prompts never seen."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dspark_batch.check import open_reading
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.output.look import look
from dspark_batch.pair import load_pair
from dspark_batch.train.corpus import Rendering, group_of, is_held_out, taught
from dspark_batch.train.measure import Sample, measure
from dspark_batch.train.teacher import TappedTarget
from dspark_batch.train.training import Reports

_TOGETHER = 8  # answers
_LONGEST = 2048  # tokens of a prompt with its answer


def outs_of(out: Path) -> list[str]:
    """Name the outputs of the runs of answers."""
    return [str(path.with_suffix("")) for path in sorted(out.glob("answers-*.jsonl.run"))]


def compare(
    out: Path, names: Sequence[str], column: str | None, *, most: int
) -> dict[str, Reports]:
    """Measure drafters on the same answers.

    Args:
        out: where the recipe puts its files.
        names: of the drafters.
        column: whose values are measured apart; None: all together.
        most: answers.

    Returns:
        What `measure` says of each drafter.
    """
    samples, reports = list(_samples(out, column))[:most], {}
    for name in names:
        pair = load_pair(target=str(out / "target"), drafter=str(out / name), drafter_bits=None)
        tapped = TappedTarget(pair.target.model, pair.drafter.tap_ids)
        with as_they_come():
            reports[name] = measure(pair.drafter, tapped, samples, batch=_TOGETHER)
    return reports


def _samples(out: Path, column: str | None) -> Iterator[Sample]:
    jobs = [job for job in map(look, outs_of(out)) if not job.spec.temperature]
    opened = open_reading(jobs[0].spec)
    reads = Rendering(opened.render, opened.context_length)
    for job in jobs:
        with job.rows() as rows:
            for record, entry in rows.recorded():
                if entry.row["finish_reason"] != "stop" or not is_held_out(entry.digest):
                    continue
                pair = taught(record, entry, job, reads, _LONGEST)
                if not isinstance(pair, str):
                    yield Sample(group_of(record, column, job), *map(list, pair))
