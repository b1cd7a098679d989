"""`dspark-batch bench`: plain decoding, speculation and mlx-lm beside each other."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from dspark_batch.cli.numbers import Whole
from dspark_batch.cli.run_command import run_command, typed
from dspark_batch.errors import UsageError
from dspark_batch.spec.job_file import SUFFIX
from dspark_batch.spec.spec import STDOUT, Spec
from dspark_batch.wording import count, one_line, speed, table

if TYPE_CHECKING:
    from dspark_batch.audit.replay import Difference
    from dspark_batch.bench import Comparison, Standing

_LABEL_WIDTH = 14
_MOST_SHOWN = 3
# Options of `run` that say what is asked, of whom, and how it is decoded.
_OF_RUN = (
    *("inputs", "family", "target", "drafter", "target_bits", "drafter_bits", "dtype"),
    *("trust_remote_code", "system_prompt", "system_column", "thinking", "prompt_column"),
    *("messages_column", "last_assistant", "ignore_fields", "special_tokens", "id_column"),
    *("template", "on_overflow", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "bad_words", "min_tokens"),
    *("ignore_eos", "lookup"),
    *("stop", "slots", "draft_length", "no_prefix_cache", "confidence_threshold", "limit", "quiet"),
)


@click.pass_context
def _bench(
    context: click.Context,
    /,
    *,
    turns: int,
    no_mlx_lm: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> int:
    """Measure what speculation gains here, with your pair and on your prompts.

    Answers every record of INPUT... plainly, with speculation and by mlx-lm's BatchGenerator: one
    process, one loaded pair, in turns. Says how fast each was and whether its answers are those of
    plain decoding, token for token. Writes no rows. Exit code 3 if speculation changed an answer.
    """
    from dspark_batch.bench import bench
    from dspark_batch.cli.progress import watch

    given = typed(context, choices)
    if given["inputs"][0].endswith(SUFFIX):
        raise UsageError(f"{given['inputs'][0]}: bench takes no job file; name its inputs.")
    spec = Spec(**given, out=STDOUT)  # where no row goes
    with watch(quiet=quiet) as show:
        found = bench(spec, turns=turns, outside=not no_mlx_lm, observe=show)
    if as_json:
        import json

        click.echo(json.dumps(found.to_json()))
    else:
        click.echo("\n".join(_lines(found)))
    return found.exit_code


bench_command = click.Command(
    "bench",
    callback=_bench,
    help=_bench.__doc__,
    params=[
        *(each for each in run_command.params if each.name in _OF_RUN),
        click.Option(
            ["--turns"],
            metavar="N",
            type=Whole(min=1),
            default=4,
            show_default=True,
            help="Turns of each. The first warms up, unless it is the only one; the median of the "
            "others is told.",
        ),
        click.Option(["--no-mlx-lm"], is_flag=True, help="Leave mlx-lm out."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ],
)


def _lines(found: "Comparison") -> Iterator[str]:
    yield click.style(_headline(found), bold=True) + "\n"
    headings = ("", "tokens/s", "times plain", "accept length", "same tokens as plain")
    yield table(headings, [_cells(found, each) for each in found.standings]) + "\n"
    for label, text in _facts(found):
        yield click.style(f"  {label:<{_LABEL_WIDTH if label else 2}}", dim=True) + one_line(text)


def _headline(found: "Comparison") -> str:
    speculation = found.speculation
    if speculation is None:
        return f"Plain decoding: {speed(found.plain.tokens_per_s)} tokens/s."
    if found.plain.different:
        return "Plain decoding does NOT give the same answers again."
    gain = f"{found.times_plain(speculation):.1f} times plain decoding"
    if speculation.different:
        changed = f"{count(speculation.different)} of {count(found.items)}"
        return f"Speculation: {gain}, but it CHANGED answers: {changed}."
    same = f"{count(speculation.equal)} of {count(found.items)}"
    length = f", accept length {speculation.accept_length:.2f}" if speculation.accept_length else ""
    return f"Speculation: {gain}, same bytes: {same}{length}."


def _cells(found: "Comparison", standing: "Standing") -> tuple[str, ...]:
    length = standing.accept_length
    return (
        standing.name,
        speed(standing.tokens_per_s),
        f"{found.times_plain(standing):.2f}",
        "" if length is None else f"{length:.2f}",
        f"{count(standing.equal)} of {count(found.items)}",
    )


def _facts(found: "Comparison") -> Iterator[tuple[str, str]]:
    """Yield label and text of each line; one without a label belongs to the line above."""
    tokens = (
        f"{count(found.prompt_tokens)} prompt, {count(found.plain.completion_tokens)} completion"
    )
    yield "items", f"{count(found.items)}; tokens: {tokens}"
    if found.not_asked:
        codes = ", ".join(f"{count(n)} {code}" for code, n in found.not_asked.most_common())
        yield "not asked", codes
        yield from (("", message) for message in found.first_failures)
    yield "turns", _turns(found.turns)
    yield "slots", ", ".join(f"{each.name} {each.slots}" for each in found.standings)
    yield from found.facts.items()
    for name, why in found.left_out.items():
        yield name, f"left out: {why}"
    for standing in found.standings:
        yield from _differences(found, standing)


def _turns(turns: int) -> str:
    if turns == 1:
        return "one of each, without warming up; prompts are part of it"
    return f"medians of {count(turns - 1)} after one to warm up; prompts are part of it"


def _differences(found: "Comparison", standing: "Standing") -> Iterator[tuple[str, str]]:
    if not standing.different:
        return
    told = f"{count(standing.different)} of {count(found.items)} answers are others"
    if standing.near_ties == standing.different:
        told += (
            f", all by near-ties: the logits lie at most {standing.spread:.2g} apart, and rounding "
            f"explains {2 * found.divergence:.2g}"
        )
    yield standing.name, told
    for each in standing.differences[:_MOST_SHOWN]:
        yield "", _told(each, standing.name)


def _told(difference: "Difference", name: str) -> str:
    """Say where an answer leaves that of plain decoding."""
    at = "" if difference.position is None else f" at answer token {difference.position}"
    apart = "" if difference.spread is None else f", {difference.spread:.2g} apart"
    both = f"{difference.row!r} by {name}, {difference.baseline!r} by plain decoding"
    return f"{difference.where}: {difference.verdict}{at}: {both}{apart}"
