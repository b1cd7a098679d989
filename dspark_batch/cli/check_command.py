"""`dspark-batch check`: what a run would find, without its models."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from dspark_batch.cli.numbers import Whole
from dspark_batch.cli.run_command import run_command, spec_of
from dspark_batch.wording import count, duration, one_line, size

if TYPE_CHECKING:
    from dspark_batch.check import Check

_LABEL_WIDTH = 14
_NOT_OF_CHECK = ("show", "quiet", "json_progress")


@click.pass_context
def _check(context: click.Context, /, *, prompts: int, **choices: Any) -> int:
    """Check what `run` with the same options would do, without the weights.

    Reads every record, renders and counts the prompts, and finds what cannot be asked, duplicates
    and shared beginnings. Estimates time from what this job has shown: try --limit 20 first. The
    exit code is the one that the run would end with, as far as the input decides it.
    """
    from dspark_batch.check import check

    found = check(spec_of(context, choices), examples=prompts)
    click.echo(click.style(_headline(found), bold=True) + "\n")
    for label, text in _facts(found):
        click.echo(click.style(f"  {label:<{_LABEL_WIDTH if label else 2}}", dim=True) + text)
    for example in found.examples:
        head = f"\n{example.where} as the model sees it, {count(example.tokens)} tokens:"
        click.echo(click.style(head, bold=True) + f"\n{example.text}")
    return found.exit_code


check_command = click.Command(
    "check",
    callback=_check,
    help=_check.__doc__,
    params=[
        *(each for each in run_command.params if each.name not in _NOT_OF_CHECK),
        click.Option(
            ["--prompts"],
            metavar="N",
            type=Whole(min=0),
            default=1,
            show_default=True,
            help="Show the first N prompts as the model will see them.",
        ),
    ],
)


def _headline(found: "Check") -> str:
    bad = found.without_request.total()
    if not bad:
        return f"All {count(found.records)} records can be asked."
    return f"{count(found.records - bad)} of {count(found.records)} records can be asked."


def _facts(found: "Check") -> Iterator[tuple[str, str]]:
    """Yield label and text of each line; one without a label belongs to the line above."""
    if found.without_request:
        codes = (f"{count(n)} {code}" for code, n in found.without_request.most_common())
        yield "not asked", ", ".join(codes)
        yield from (("", one_line(message)) for message in found.first_failures)
    prompts = found.prompts
    if prompts.lengths:
        yield "prompts", _prompts(found)
        share = prompts.repeated_tokens / prompts.tokens
        yield "shared", f"{share:.0%} of prompt tokens repeat how an earlier prompt begins"
    if prompts.repeated_ids:
        names = ", ".join(prompts.first_repeated_ids)
        yield (
            "duplicates",
            f"{count(prompts.repeated_ids)} records have the name of an earlier one: {names}",
        )
    if prompts.repeated_contents:
        yield "duplicates", f"{count(prompts.repeated_contents)} records equal an earlier one"
    yield from (("ignored", f"`{k}` of {count(n)} records") for k, n in found.ignored.items())
    yield from (("hint", one_line(hint)) for hint in found.hints)
    yield "to do", _to_do(found)
    if found.total > found.resumed:
        yield "time", _time(found)
        if found.audited:
            yield "audit", _audit(found)
        yield "memory", _memory(found)
        yield "disk", _disk(found)


def _prompts(found: "Check") -> str:
    prompts = found.prompts
    return (
        f"{count(prompts.tokens)} tokens, median {count(prompts.median)}, longest "
        f"{count(prompts.longest)} at {prompts.longest_at}; the context has "
        f"{count(found.context_length)}"
    )


def _to_do(found: "Check") -> str:
    if found.holder:
        return f"{found.out} is being made by {found.holder}; a run would be refused"
    if not found.has_job:
        return f"{count(found.total)} rows, from the start"
    left = found.total - found.resumed
    return (
        f"{count(left)} of {count(found.total)} rows; a run would continue: the settings and the "
        "tokenizer are the same, the weights were not compared"
    )


def _time(found: "Check") -> str:
    if found.seconds is None:
        return "not measured yet: run it with --limit 20, then check again"
    return f"about {duration(found.seconds)} and loading, at the pace of this job's last start"


def _audit(found: "Check") -> str:
    items = f"{count(found.audited)} items are decoded again, one token per step"
    if found.audit_seconds is None:
        return f"{items}; not measured yet"
    return f"{items}: at most about {duration(found.audit_seconds)} more"


def _memory(found: "Check") -> str:
    weights = "weights that are not all here"
    if found.weight_bytes is not None:
        weights = f"{size(found.weight_bytes)} of weights as they are stored"
    if found.slot_bytes is None:
        return weights
    cache = f"up to about {size(found.slot_bytes)} of the target's cache for"
    return f"{weights}, and {cache} {_slots(found.slots)}"


def _slots(slots: int | None) -> str:
    if slots is None:
        return "each slot; the start chooses how many"
    return "the slot" if slots == 1 else f"each of {slots} slots"


def _disk(found: "Check") -> str:
    most = "about" if found.disk_is_measured else "at most"
    free = size(found.free_bytes)
    return f"{most} {size(found.disk_bytes)} for journal and output; {free} are free"
