"""`dspark-batch show`: the first rows of an output, one line each."""

from pathlib import Path

import click

from dspark_batch.cli.numbers import Whole
from dspark_batch.errors import UsageError
from dspark_batch.job.wording import one_line


@click.command("show")
@click.argument("out", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-n",
    "limit",
    metavar="N",
    type=Whole(min=1),
    default=5,
    show_default=True,
    help="Show the first N rows.",
)
def show_command(out: Path, limit: int) -> None:
    """Show the first rows of OUT, one line each."""
    if not out.exists():
        raise UsageError(
            f"{out}: no such file. An output appears when its run is complete; "
            "to complete one that was stopped, run its command again."
        )
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dspark_batch.job.shown import first_rows

    table = Table(box=None, expand=True, pad_edge=False)
    table.add_column("custom_id", no_wrap=True)
    table.add_column("prompt", no_wrap=True, ratio=2, style="dim")
    table.add_column("completion", no_wrap=True, ratio=3)
    table.add_column("accept length", justify="right")
    for row in first_rows(str(out), limit):
        length = "" if row.accept_length is None else f"{row.accept_length:.2f}"
        cells = (row.custom_id, row.prompt, row.answer, length)
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    Console().print(table)
