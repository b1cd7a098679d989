"""`dspark-batch run`: every option is a field of Spec, and takes its default from there."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click
from click.core import ParameterSource

from dspark_batch.cli.numbers import Number, Whole, WholeOrAuto
from dspark_batch.errors import DsparkBatchError, UsageError
from dspark_batch.spec.job_file import CONTENTS, SUFFIX, TEXTS, content_of, read_job, text_of
from dspark_batch.spec.share import ALL, share_of
from dspark_batch.spec.spec import (
    MOST_SLOTS,
    STDOUT,
    Bits,
    Dtype,
    Format,
    LastAssistant,
    Overflow,
    Regenerate,
    Resume,
    Spec,
    SpecialTokens,
    Thinking,
)
from dspark_batch.types import MOST_LOGPROBS, SamplingRule

if TYPE_CHECKING:
    from dspark_batch.output.report import Report, Tick

_YAML = (".yaml", ".yml")
_F = TypeVar("_F", bound=Callable[..., object])
_DEFAULT_BY_FIELD = {field.name: field.default for field in fields(Spec)}


def _option(name: str, **settings: Any) -> Callable[[_F], _F]:
    default = _DEFAULT_BY_FIELD[name.removeprefix("--").replace("-", "_")]
    shown = default is not False and default not in (None, "", ())
    return click.option(name, default=default, show_default=shown, **settings)


trust_option = _option(  # of every command that loads a target; no file can say it
    "--trust-remote-code",
    is_flag=True,
    help="Let a target run Python code of its own; without this such a target is refused.",
)


def families(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a registered pair, for the shell."""
    from dspark_batch.registry import list_pairs

    return [pair.family for pair in list_pairs() if pair.family.startswith(incomplete)]


class _BitsChoice(click.Choice[str]):
    """Numbers of bits, and words besides them."""

    def __init__(self, *words: str) -> None:
        super().__init__([*words, *map(str, get_args(Bits))])

    def convert(  # type: ignore[override]  # click's own gives a word and nothing else
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        word = super().convert(str(value), param, ctx)
        return int(word) if word.isdigit() else word


class _Share(click.ParamType[object]):
    """A share of the items, in one of the spellings of `share_of`."""

    name = "share"

    def convert(
        self,
        value: Any,  # noqa: ANN401  as click has it
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> object:
        try:
            share_of(value)
        except ValueError:
            self.fail(f"{value!r} is no share; write =1%, or put this behind INPUT.", param, ctx)
        return value


class _Column(click.ParamType[str]):
    """The name of an input column, behind an option that stands without one, too."""

    name = "column"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if Path(value).exists():
            self.fail(f"{value!r} is a file; write =COLUMN, or put this behind INPUT.", param, ctx)
        return value


@click.command("run")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o",
    "--out",
    metavar="OUT",
    type=click.Path(),
    help="Write rows to this file or URL, *.parquet or *.jsonl; - for standard output, row by row.",
)
@_option(
    "--family",
    metavar="NAME",
    help="Use this registered pair of target and drafter.  [default: tiny]",
    shell_complete=families,
)
@_option(
    "--target",
    metavar="MODEL",
    help="Target, instead of the family's: a directory, or ORG/NAME or ORG/NAME@REVISION on the "
    "Hugging Face Hub. A known name finds its drafter.",
)
@_option("--drafter", metavar="MODEL", help="Drafter, instead of the known one: as --target.")
@_option(
    "--target-bits",
    type=_BitsChoice(),
    help="Quantise the target while it loads.  [default: as it is stored]",
)
@_option(
    "--drafter-bits",
    type=_BitsChoice("auto", "stored"),
    help="Quantise the drafter while it loads; auto: 4 on an Apple GPU unless it is small, else as "
    "stored.",
)
@trust_option
@_option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    help="Compute in this type.  [default: float32 on a CPU, as stored elsewhere]",
)
@_option(
    "--system-prompt",
    metavar="TEXT",
    help="For every item that brings none of its own. @FILE reads it from a file.",
)
@_option("--system-column", metavar="COLUMN", help="Field that holds a record's system prompt.")
@_option(
    "--thinking",
    type=click.Choice(get_args(Thinking)),
    help="Let the target think before it answers.  [default: as the drafter of a known pair was "
    "trained, else as the chat template does]",
)
@_option(
    "--prompt-column",
    metavar="COLUMN",
    help="Ask what this field holds, a prompt.  [default: prompt]",
)
@_option(
    "--messages-column",
    metavar="COLUMN",
    help="Ask what this field holds, a list of chat messages.  [default: messages]",
)
@_option(
    "--last-assistant",
    type=click.Choice(get_args(LastAssistant)),
    help="An assistant turn at the end of a conversation: drop it and answer the turn before, go "
    "on with its text, or refuse the record.",
)
@_option(
    "--regenerate",
    type=click.Choice(get_args(Regenerate)),
    help="Make the last answer of a conversation again, or all, each behind the new ones, and "
    "write the conversation back in its shape.",
)
@_option(
    "--ignore-fields",
    metavar="NAME,...",
    multiple=True,
    help="Leave these fields of a record aside instead of refusing it; repeatable.",
)
@_option(
    "--special-tokens",
    type=click.Choice(get_args(SpecialTokens)),
    help="Names of control tokens inside messages: plain text, or the tokens.",
)
@_option(
    "--template",
    metavar="TEXT",
    help="Jinja over the columns; the prompt is what it renders. @FILE reads it from a file.",
)
@_option(
    "--on-overflow",
    type=click.Choice(get_args(Overflow)),
    help="A prompt that leaves no room for an answer: a failure row, a skipped row, or cut at "
    "its beginning or end.",
)
@_option(
    "--id-column",
    metavar="COLUMN",
    help="Field that names a record.  [default: custom_id, else id]",
)
@_option("--samples", metavar="N", type=Whole(min=1), help="Answers to each record.")
@_option("--keep", metavar="COLUMN", multiple=True, help="Only these input columns; repeatable.")
@_option("--drop", metavar="COLUMN", multiple=True, help="Not these input columns; repeatable.")
@_option(
    "--output-column", metavar="COLUMN", help="Write the completion here.  [default: completion]"
)
@_option(
    "--output-prefix",
    metavar="TEXT",
    help="Put this before each of our column names.",
)
@_option(
    "--format",
    type=click.Choice(get_args(Format)),
    help="rows: input columns, then ours; openai: lines as the OpenAI Batch API writes them.",
)
@_option("--max-tokens", metavar="N", type=Whole(min=1), help="Most tokens of an answer.")
@_option(
    "--temperature",
    metavar="T",
    type=Number(min=0),
    help="Draw at this temperature; 0 takes the most likely token.",
)
@_option(
    "--top-p",
    metavar="P",
    type=Number(min=0, max=1, min_open=True),
    help="Draw only from the likeliest tokens that together have this probability.",
)
@_option(
    "--top-k",
    metavar="N",
    type=Whole(min=0),
    help="Draw only from this many likeliest tokens; 0: all.",
)
@_option(
    "--min-p",
    metavar="P",
    type=Number(min=0, max=1),
    help="Draw only tokens this likely, as a share of the likeliest one's probability.",
)
@_option("--seed", metavar="N", type=int, help="Draw other answers with another number.")
@_option(
    "--stop", metavar="TEXT", multiple=True, help="End an answer before this text; repeatable."
)
@_option(
    "--frequency-penalty",
    metavar="P",
    type=Number(min=-2, max=2),
    help="Take this off a token's logit for each time that the answer has it.",
)
@_option(
    "--presence-penalty",
    metavar="P",
    type=Number(min=-2, max=2),
    help="Take this off a token's logit once the answer has it.",
)
@_option(
    "--repetition-penalty",
    metavar="P",
    type=Number(min=0, max=100, min_open=True),
    help="Make tokens of the prompt and the answer less likely: divide their logits; 1: do not.",
)
@_option(
    "--bad-words", metavar="TEXT", multiple=True, help="Never say this in an answer; repeatable."
)
@_option(
    "--min-tokens", metavar="N", type=Whole(min=0), help="Let no answer end before so many tokens."
)
@_option(
    "--ignore-eos", is_flag=True, help="Let the target's own end-of-answer tokens end no answer."
)
@_option(
    "--logprobs",
    metavar="K",
    type=Whole(min=0, max=MOST_LOGPROBS),
    help="Tell the log-probability of each token, and of the K likeliest tokens beside it.",
)
@_option(
    "--prompt-logprobs",
    metavar="K",
    type=Whole(min=0, max=MOST_LOGPROBS),
    help="Tell the same of each token of the prompt.",
)
@_option(
    "--score",
    metavar="COLUMN",
    type=_Column(),
    is_flag=False,
    flag_value="completion",
    help="Generate nothing: tell the log-probability of the answer in the column `completion`, or "
    "in another, as =chosen.",
)
@_option(
    "--json-schema",
    metavar="FILE",
    help="Every answer is JSON that this JSON Schema allows; column `parsed` has it as a value.",
)
@_option("--regex", metavar="REGEX", help="Every answer matches this, from end to end.")
@_option("--grammar", metavar="FILE", help="Every answer is a text of this Lark grammar.")
@_option(
    "--choice", metavar="TEXT", multiple=True, help="Every answer is one of these; repeatable."
)
@_option(
    "--sampling",
    type=click.Choice(get_args(SamplingRule)),
    help="coupled: no setting of speed changes an answer; rejection: the paper's rule, a little "
    "faster, its answers depend on the drafts. Both are exact samples of the target.",
)
@_option(
    "--slots",
    metavar="N",
    type=WholeOrAuto(min=1, max=MOST_SLOTS),
    help="Sequences that decode together; auto: as many as are worth a pass and fit into memory.",
)
@_option(
    "--draft-length",
    metavar="K",
    type=WholeOrAuto(min=0),
    help="Drafts per round; 0 decodes plainly; auto: what pays, round by round.",
)
@_option(
    "--workers",
    metavar="N",
    type=WholeOrAuto(min=1),
    help="Processes with a pair each, on Ray; auto: one for each GPU.  [default: this process "
    "alone]",
)
@_option(
    "--ray",
    metavar="HOST:PORT",
    help="Begin the workers in this running Ray cluster; auto: the one that this machine is in.",
)
@_option(
    "--worker-resources",
    metavar="JSON",
    help="What a worker takes of the cluster, as '{\"mlx\": 1}'.  [default: a GPU, else a CPU]",
)
@_option(
    "--lookup",
    is_flag=True,
    help="Draft what prompt and answer say themselves, where that is likelier to be right.",
)
@_option(
    "--no-prefix-cache",
    is_flag=True,
    help="Compute every prompt whole, also where several begin alike.",
)
@_option(
    "--confidence-threshold",
    metavar="P",
    type=Number(min=0, max=1),
    help="Verify a block up to its first draft with less confidence; 0: all of it.",
)
@_option(
    "--log-confidence",
    is_flag=True,
    help="Write the confidence of every verified draft into metrics, for `calibrate`.",
)
@_option(
    "--resume",
    type=click.Choice(get_args(Resume)),
    help="Continue what OUT.run holds; always: refuse to begin; never: refuse to continue.",
)
@_option("--overwrite", is_flag=True, help="Discard what OUT and OUT.run hold, and start over.")
@_option(
    "--retry-failed", is_flag=True, help="Run failed items again: --retry-where status=errored."
)
@_option(
    "--retry-where",
    metavar="COLUMN=VALUE",
    multiple=True,
    help="Run items again whose last row has this status (errored, skipped) or error.code; "
    "repeatable: one of them is enough.",
)
@_option("--limit", metavar="N", type=Whole(min=1), help="Only the first N records.")
@_option(
    "--shard",
    metavar="I/N",
    help="Only the I-th of N equal parts of the records; `merge` joins the outputs of all.",
)
@_option("--fsync-every", metavar="N", type=Whole(min=1), help="Rows per fsync of the journal.")
@_option(
    "--grace",
    metavar="S",
    type=Number(min=0),
    help="After a first Ctrl-C, the seconds to finish what is in flight.",
)
@_option(
    "--deadline",
    metavar="HH:MM",
    help="Begin no item that would end after this local time; exit code 75 if some are left.",
)
@_option(
    "--max-runtime",
    metavar="TIME",
    help="Begin no item that would end later than this after the start: 6h, 1h30m, 90s.",
)
@_option(
    "--verify-greedy",
    metavar="SHARE",
    type=_Share(),
    is_flag=False,
    flag_value=ALL,
    help="Decode items again without drafts, and stop at an answer that is not the same: all, or "
    "a share, as =1%.",
)
@_option(
    "--max-mismatches",
    metavar="N",
    type=Whole(min=1),
    help="Stop at the Nth answer that --verify-greedy finds.",
)
@_option("--report-by", metavar="COLUMN", help="Compare this input column's values in the report.")
@click.option(
    "--show",
    metavar="N",
    type=Whole(min=0),
    default=0,
    show_default=True,
    help="Show the first N rows that finish, beside the progress.",
)
@click.option(
    "-q", "--quiet", is_flag=True, help="No progress, no summary; warnings and errors still show."
)
@click.option(
    "--json-progress", is_flag=True, help="Progress on stderr as one JSON object per line."
)
@click.pass_context
def run_command(
    context: click.Context, /, *, show: int, quiet: bool, json_progress: bool, **choices: Any
) -> int:
    """Answer every record of INPUT..., one row of OUT for each.

    INPUT is a file (JSON lines, a JSON array, CSV, TSV, Parquet or Arrow; packed or not), a glob, a
    URL, - for standard input, or a job file (.toml), whose keys are these options. A record has a
    `prompt`, `messages`, or another known shape. The same command continues a run that was stopped.
    """
    spec = spec_of(context, choices)
    return run_spec(spec, quiet=quiet, json_progress=json_progress, num_shown=show)


def run_spec(spec: Spec, *, quiet: bool, json_progress: bool = False, num_shown: int = 0) -> int:
    """Run a job in front of a person, and return the exit code.

    Args:
        spec: the job.
        quiet: no progress and no summary.
        json_progress: progress for programs.
        num_shown: how many of the first rows are shown as they finish.
    """
    # Heavy imports wait until there is work, so that --help answers at once.
    from dspark_batch.cli.draining import Draining
    from dspark_batch.cli.first_rows import FirstRows
    from dspark_batch.cli.progress import is_live, watch
    from dspark_batch.run import run

    shown = {"quiet": quiet, "as_json": json_progress}
    draining = Draining(spec.grace, is_shown=is_live(**shown))
    rows = FirstRows(num_shown, spec)
    with watch(**shown, notice=draining.notice, rows=rows) as show, draining:

        def observe(tick: "Tick") -> None:
            draining(is_worth_it=tick.stage == "decode")
            show(tick)

        report = run(spec, observe=observe, stop=draining.is_asked)
    tell_end(report, spec.out, quiet=quiet)
    return report.exit_code


def tell_end(report: "Report", out: str, *, quiet: bool) -> None:
    """Say what came out of a finished job, and write its page."""
    from dspark_batch.cli.summary import fact, summary

    to_stdout = out == STDOUT  # then rows go there, and words elsewhere
    if not quiet:
        with suppress(OSError):  # stdout may be gone or full; the job is over all the same
            click.echo(summary(report), err=to_stdout)
    page = None if to_stdout else _page(out)  # takes a second, behind all that is waited for
    if page and not quiet:
        with suppress(OSError):
            click.echo(fact("report", page))


def _page(out: str) -> str | None:
    """Write the page of a finished run; None: it cannot be made, which a warning says."""
    from dspark_batch.report import write_report

    try:
        return str(write_report(out))
    except DsparkBatchError as error:  # the output is there all the same
        logging.getLogger("dspark_batch").warning("%s", error)
        return None


def spec_of(context: click.Context, choices: Mapping[str, Any]) -> Spec:
    """Take options before the job file's keys, and both before the defaults."""
    given = typed(context, choices)
    first, *rest = given.pop("inputs")
    if first.lower().endswith(_YAML):
        raise UsageError(
            f"{first}: job files are TOML; write its keys as `key = value` in a .toml."
        )
    if first.endswith(SUFFIX):
        return Spec(**_job(first, given | ({"inputs": tuple(rest)} if rest else {})))
    if "out" not in given:
        out = next(each for each in context.command.params if each.name == "out")
        raise click.MissingParameter(ctx=context, param=out)
    return Spec(inputs=(first, *rest), **given)


def _job(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Read a job file, which has to name what the options leave open."""
    fields = read_job(Path(path), datetime.now().astimezone().date()) | given
    if "inputs" not in fields:
        raise UsageError(f'{path}: no inputs; add `inputs = ["…"]`, or name files after it.')
    if "out" not in fields:
        raise UsageError(f'{path}: no out; add `out = "…"`, or give -o.')
    return fields


def typed(context: click.Context, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Select what the person gave, without the defaults."""
    given = {
        name: value
        for name, value in choices.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    for name in TEXTS & given.keys():
        given[name] = text_of(given[name], Path())
    for name in CONTENTS & given.keys():
        given[name] = content_of(given[name], Path())
    if "ignore_fields" in given:
        named = (name.strip() for each in given["ignore_fields"] for name in each.split(","))
        given["ignore_fields"] = tuple(filter(None, named))
    return given
