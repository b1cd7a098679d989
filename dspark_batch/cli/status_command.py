"""`dspark-batch status`: where a job stands, running or not."""

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

import click

from dspark_batch.output.plan import plan_text
from dspark_batch.wording import count, duration, speed

if TYPE_CHECKING:
    from dspark_batch.output.status import Status

_LABEL_WIDTH = 14


@click.command("status")
@click.argument("out", metavar="OUT")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status_command(out: str, as_json: bool) -> None:
    """Say where the job that makes OUT stands, whether it runs or not.

    Disturbs no run: it reads the journal, and only asks who holds the lock.
    """
    from dspark_batch.output.status import status

    found = status(out)
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps(asdict(found)))
        return
    click.echo(click.style(_headline(found), bold=True) + "\n")
    for label, text in _facts(found):
        click.echo(click.style(f"  {label:<{_LABEL_WIDTH}}", dim=True) + text)


def _headline(found: "Status") -> str:
    if found.holder:
        return f"{found.out} is being made by {found.holder}."
    if found.state == "finished":
        return f"{found.out} is finished."
    return f"{found.out} was stopped; its command continues it."


def _facts(found: "Status") -> Iterator[tuple[str, str]]:
    of = "" if found.total is None else f" of {count(found.total)}"
    failed = f", {count(found.failed)} of them failed" if found.failed else ""
    if found.shard is not None:
        yield "shard", found.shard
    yield "rows", f"{count(found.done)}{of}{failed}"
    if found.remaining_s is not None:
        yield "left", duration(found.remaining_s)
    if found.tokens_per_s is not None:
        now = found.recent_tokens_per_s
        recent = "" if now is None else f"{speed(now)} tokens/s in the last minute, "
        yield "speed", f"{recent}{speed(found.tokens_per_s)} tokens/s mean"
    if found.accept_length is not None:
        yield "accept length", f"{found.accept_length:.2f} tokens per round"
    if found.plan is not None:
        yield "plan", plan_text(found.plan)
    if found.starts > 1:
        yield "starts", count(found.starts)
    if found.last_row_at is not None:
        yield (
            "last row",
            f"{datetime.fromtimestamp(found.last_row_at).astimezone():%Y-%m-%d %H:%M:%S}",
        )
