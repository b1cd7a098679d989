"""`dspark-batch verify`: whether a run is what it says, recomputed and decoded again."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from dspark_batch.cli.numbers import Whole, WholeOrAuto
from dspark_batch.cli.run_command import trust_option
from dspark_batch.wording import count, duration, one_line, table

if TYPE_CHECKING:
    from dspark_batch.verify import Audit

_MOST_SHOWN = 10
_WHAT = {
    "manifest": "the manifest against its digest",
    "inputs": "input files against their digests",
    "journal": "rows against records: none missing, none twice",
    "output": "the output against journal and input, row by row",
    "report": "the counts of the report",
    "models": "weights, tokenizer and settings against the manifest",
    "rows": "each row: text, limits, ends, statistics",
    "replay": "answers decoded again",
}


@click.command("verify")
@click.argument("out", metavar="OUT")
@click.option(
    "--sample",
    metavar="N",
    type=Whole(min=0),
    help="Decode only N answers again, always the same.  [default: all]",
)
@click.option(
    "--slots",
    metavar="N",
    type=Whole(min=1),
    help="Answers that decode together.  [default: as in the run]",
)
@click.option(
    "--workers",
    metavar="N",
    type=WholeOrAuto(min=1),
    help="Processes that decode, with a pair each; auto: one for each GPU.  [default: this one]",
)
@click.option(
    "--against",
    type=click.Choice(["engine", "mlx-lm"]),
    default="engine",
    show_default=True,
    help="What decodes them again: our engine without drafts, or mlx-lm's own generation.",
)
@click.option("--strict", is_flag=True, help="With mlx-lm, near-ties fail as well.")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print what audit.json holds.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify_command(out: str, *, as_json: bool, quiet: bool, **choices: Any) -> int:
    """Prove that OUT is what its job had to give, finished or not.

    Recomputes digests, counts, order, texts, limits and statistics, decodes answers again without
    drafts, and writes OUT.run/audit.json. Exit code 3 if anything does not agree. Stopped, the
    same command goes on.
    """
    from dspark_batch.cli.progress import watch
    from dspark_batch.verify import verify

    with watch(quiet=quiet) as show:
        audit = verify(out, observe=show, **choices)
    if as_json:
        import json

        click.echo(json.dumps(audit.to_json()))
    else:
        click.echo("\n".join(_lines(audit)))
    return audit.exit_code


def _lines(audit: "Audit") -> Iterator[str]:
    yield click.style(_headline(audit), bold=True) + "\n"
    cells = [
        (_WHAT[step], count(number), _found(audit, step))
        for step, number in audit.looked_at.items()
    ]
    yield table(("what", "looked at", "wrong"), cells)
    for why, number in audit.left_out.items():
        yield f"\n{_many(number, 'answer')} not decoded again: {why}."
    if audit.findings or audit.differences:
        yield ""
    for finding in audit.findings[:_MOST_SHOWN]:
        yield f"{finding.kind}: {one_line(finding.says)}"
    for difference in audit.differences[:_MOST_SHOWN]:
        yield f"replay: {one_line(str(difference))}"
    more = audit.wrong.total() + len(audit.differences)
    more -= min(len(audit.findings), _MOST_SHOWN) + min(len(audit.differences), _MOST_SHOWN)
    if more:
        yield f"and {count(more)} more; audit.json has them"


def _found(audit: "Audit", step: str) -> str:
    if step != "replay":
        return count(audit.wrong[step])
    defects = sum(each.verdict == "defect" for each in audit.differences)
    ties = len(audit.differences) - defects
    return f"{_many(defects, 'defect')}, {_many(ties, 'near-tie')}" if ties else count(defects)


def _headline(audit: "Audit") -> str:
    """Say what it comes to, in one line."""
    replayed = f"{count(audit.replayed)} of {count(audit.answers)} answers decoded again"
    by = "plainly" if audit.against == "engine" else "by mlx-lm"
    took = f" in {duration(audit.seconds)}" if audit.seconds else ""
    if audit.verdict == "damaged":
        return f"{audit.out} is NOT what its job gave: {_many(audit.wrong.total(), 'finding')}."
    if audit.verdict == "different":
        answers = _many(len(audit.failing), "answer")
        return f"{audit.out} has {answers} that decoding {by} does not give."
    if not audit.replayed:
        return f"{audit.out} agrees with itself; no answer was decoded again."
    result = _many(len(audit.differences), "near-tie") if audit.differences else "all equal"
    return f"{audit.out} is what its job gave: {replayed} {by}{took}, {result}."


def _many(number: int, noun: str) -> str:
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")
