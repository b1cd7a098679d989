"""What drafters are compared on: answers to prompts that no training saw, greedy and drawn."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from dspark_batch import Spec, run
from dspark_batch.check import open_reading
from dspark_batch.intake.reader import digest_of
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.output.look import Look, look
from dspark_batch.pair import load_pair
from dspark_batch.train.corpus import Rendering, group_of, is_held_out, taught
from dspark_batch.train.measure import ALL, Sample, Tally, measure
from dspark_batch.train.teacher import TappedTarget
from dspark_batch.train.training import Reports

_TOGETHER = 8  # answers
_LONGEST = 2048  # tokens of a prompt with its answer
ENDED = "all that ended"


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


def draw(
    out: Path, names: Sequence[str], column: str | None, *, max_tokens: int, slots: int | None
) -> dict[str, Reports]:
    """Draw answers at temperature 1, with each drafter, to the prompts that no training saw.

    Which tokens come does not depend on a drafter, so all have the same answers.

    Args:
        out: where the recipe puts its files.
        names: of the drafters.
        column: whose values are measured apart; None: all together.
        max_tokens: of an answer.
        slots: None: the program chooses.

    Returns:
        What the rounds of each drafter say, as `measure` says it of greedy answers; none if no
        prompt was held out.
    """
    prompts, reports = out / "held-out.jsonl", {}
    lines = (out / "prompts-0.jsonl").read_bytes().split(b"\n")
    never_seen = [line for line in lines if line and is_held_out(digest_of(line))]
    prompts.write_bytes(b"\n".join(never_seen))
    for name in names if never_seen else ():
        drawn = out / f"drawn-{name}.jsonl"
        run(
            Spec(
                inputs=(str(prompts),),
                out=str(drawn),
                target=str(out / "target"),
                drafter=str(out / name),
                temperature=1.0,
                draft_length=json.loads((out / name / "config.json").read_bytes())["block_size"],
                max_tokens=max_tokens,
                slots=slots or "auto",
                overwrite=True,  # the drafter may be another one than before
            )
        )
        reports[name] = _rounds(look(str(drawn)), column)
    return reports


def _rounds(job: Look, column: str | None) -> Reports:
    tallies: dict[str, Tally] = defaultdict(Tally)
    with job.rows() as rows:
        for record, entry in rows.recorded():
            row = entry.row
            if not row["metrics"]:
                continue  # a failure
            groups = {ALL, group_of(record, column, job)}
            groups |= {ENDED} if row["finish_reason"] == "stop" else set()
            left = len(row["token_ids"]) - 1  # the first one came with the prompt
            for accepted in row["metrics"]["speculative_decoding"]["per_step_accepted"]:
                committed = min(accepted + 1, left)
                left -= committed
                for name in groups:
                    tallies[name].add(accepted, committed, job.spec.draft_length)
    return {name: tally.report() for name, tally in tallies.items()}
