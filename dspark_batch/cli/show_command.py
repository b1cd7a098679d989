"""`dspark-batch show`: the first rows of an output, one line each, or an item in full."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import click

from dspark_batch.cli.numbers import Whole
from dspark_batch.errors import UsageError
from dspark_batch.wording import lines, one_line

if TYPE_CHECKING:
    from dspark_batch.output.shown import Shown


@click.command("show")
@click.argument("out", metavar="OUT", type=click.Path())
@click.option(
    "-n",
    "limit",
    metavar="N",
    type=Whole(min=1),
    default=5,
    show_default=True,
    help="Show the first N rows.",
)
@click.option(
    "--where",
    metavar="COLUMN=VALUE",
    multiple=True,
    help="Only rows with this value, such as finish_reason=length or error.code=engine; "
    "repeatable: one of them is enough.",
)
@click.option(
    "--full", "item", metavar="ITEM", help="All that the item with this custom_id asked and got."
)
def show_command(out: str, limit: int, where: tuple[str, ...], item: str | None) -> None:
    """Show the first rows of OUT, one line each; also of a job that still runs."""
    from dspark_batch.output.shown import rows_of
    from dspark_batch.record.run_dir import RunDir
    from dspark_batch.spec.where import read_where

    run_dir = RunDir(out)
    if not run_dir.out.exists() and not run_dir.has_job():
        raise UsageError(
            f"{out}: no such file, and no job that makes it. An output appears when its run is "
            "complete."
        )
    conditions = [read_where("--where", each) for each in where]
    rows = rows_of(out, where=conditions, custom_id=item)
    if item is None:
        first = list(islice(rows, limit))
        _print_table(first)
        if where and not first:
            click.echo(f"{out}: no row has {' or '.join(where)}.", err=True)
        return
    texts = [text for row in rows for text in _in_full(row)]
    if not texts:
        raise UsageError(f"{out}: no row has the custom_id {item}; `show -n 20` lists the first.")
    click.echo("\n".join(texts))


def _print_table(rows: "Iterable[Shown]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, expand=True, pad_edge=False)
    table.add_column("custom_id", no_wrap=True)
    table.add_column("prompt", no_wrap=True, ratio=2, style="dim")
    table.add_column("completion", no_wrap=True, ratio=3)
    table.add_column("accept length", justify="right")
    for row in rows:
        length = "" if row.accept_length is None else f"{row.accept_length:.2f}"
        answer = row.answer or (f"(still thinking) {row.reasoning}" if row.reasoning else "")
        cells = (row.custom_id, row.prompt, answer, length)
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    Console().print(table)


def _in_full(row: "Shown") -> Iterator[str]:
    """Write a row with all its text, under headings."""
    ended = f", {row.finish_reason}" if row.finish_reason else ""
    sample = f", sample {row.sample_index}" if row.sample_index else ""
    yield f"── {one_line(row.custom_id)}{sample}{ended}"
    parts = {"prompt": row.prompt, "reasoning": row.reasoning, "completion": row.answer}
    for heading, text in parts.items():
        if text:
            yield f"{heading}:\n{lines(text)}\n"
