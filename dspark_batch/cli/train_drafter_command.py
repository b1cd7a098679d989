"""`dspark-batch train-drafter`: a drafter from the rows of finished runs."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from dspark_batch.cli.numbers import Whole
from dspark_batch.cli.run_command import trust_option
from dspark_batch.errors import UsageError
from dspark_batch.wording import count, table

if TYPE_CHECKING:
    from dspark_batch.train.training import Lesson, Observe, Training

_GRACE_S = 600.0  # a step may take long on a CPU


@click.command("train-drafter")
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@click.option("-o", "--out", "to", metavar="DRAFTER", required=True, help="Directory to make.")
@click.option(
    "--kind",
    type=click.Choice(("dspark", "dflash")),
    help="dspark (the default) drafts each token knowing the one before it; dflash does not.",
)
@click.option("--layers", metavar="N", type=Whole(min=1), help="Layers of the drafter.")
@click.option("--block", metavar="N", type=Whole(min=1), help="Tokens that one pass drafts.")
@click.option("--taps", metavar="A,B,...", help="Layers of the target that the drafter reads.")
@click.option("--rank", metavar="N", type=Whole(min=0), help="Rank of the Markov head; 0: none.")
@click.option(
    "--steps", metavar="N", type=Whole(min=1), help="Steps in all, not ten passes over the rows."
)
@click.option("--seed", metavar="N", type=Whole(min=0, max=2**31 - 1), default=0, show_default=True)
@click.option("--init", metavar="DRAFTER", help="Go on with this drafter instead of a new one.")
@click.option("--by", metavar="COLUMN", help="Measure the values of this input column apart.")
@click.option("--max-runtime", metavar="6h", help="Stop after so long; the same command goes on.")
@click.option("--overwrite", is_flag=True, help="Start over, and replace DRAFTER.")
@trust_option
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Upload the drafter, with its card.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def train_drafter_command(  # noqa: PLR0913  one for each option
    outs: tuple[str, ...],
    to: str,
    taps: str | None,
    max_runtime: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    push_to_hub: str | None,
    private: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Train a drafter for the target that answered the runs OUT...

    It learns from the answers in their rows, and is measured on one record in twenty that it never
    sees. Sizes come from the target's by rule. A training that was stopped or killed is continued
    by the same command. Use DRAFTER as --drafter from then on.
    """
    from dspark_batch.cli.draining import Draining
    from dspark_batch.cli.progress import is_live
    from dspark_batch.train_drafter import Asked, train_drafter

    draining = Draining(_GRACE_S, is_shown=is_live(quiet=quiet))
    with _watch(quiet=quiet, notice=draining.notice) as show, draining:

        def observe(lesson: "Lesson") -> None:
            draining(is_worth_it=lesson.doing == "training")
            show(lesson)

        training = train_drafter(
            outs,
            to,
            Asked(taps=_layers(taps), **asked),
            max_runtime=max_runtime,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            observe=observe,
            stop=draining.is_asked,
        )
    click.echo("\n".join(_lines(training, to)))
    if push_to_hub is not None:
        from dspark_batch.output.push import push_drafter

        click.echo(push_drafter(to, push_to_hub, private=private))


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--taps is {text!r}, expected layer numbers such as 1,7,14.") from error


def _watch(*, quiet: bool, notice: Callable[[], str]) -> "AbstractContextManager[Observe]":
    from dspark_batch.cli.progress import is_live

    if quiet:
        return nullcontext(lambda lesson: None)
    if is_live(quiet=quiet):
        from dspark_batch.cli.curves import Curves  # rich is slow to import

        return Curves(notice)
    from dspark_batch.cli.curves import LessonLines

    return LessonLines(sys.stderr)


def _lines(training: "Training", to: str) -> Sequence[str]:
    after, before = training.after, training.before
    heads = [
        "answers of",
        "tokens",
        *(["before"] if before else []),
        "accept length",
        "by position",
    ]
    rows = []
    for name, report in after.items():
        was = [f"{before[name]['accept_length']:.2f}"] if before else []
        rates = " ".join(f"{rate:.2f}" for rate in report["accept_rate"])
        length = f"{report['accept_length']:.2f}"
        rows.append([name, count(report["tokens"]), *was, length, rates])
    left_out = [f"{count(n)} rows {why}" for why, n in training.left_out.items()]
    return [
        f"{to}: {training.about['kind']}, learnt from {count(training.answers)} answers in "
        f"{count(training.about['steps'])} steps; measured on {count(training.held_out)} others.",
        *([f"Left out: {'; '.join(left_out)}."] if left_out else []),
        "",
        table(heads, rows),
    ]
