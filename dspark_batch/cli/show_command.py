"""`dspark-batch show`: the first rows of an output, one line each."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import click

from dspark_batch.errors import UsageError
from dspark_batch.job.wording import one_line
from dspark_batch.types import Json

Row = Mapping[str, Json]


@click.command("show")
@click.argument("out", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-n",
    "limit",
    metavar="N",
    type=click.IntRange(min=1),
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

    table = Table(box=None, expand=True, pad_edge=False)
    table.add_column("custom_id", no_wrap=True)
    table.add_column("prompt", no_wrap=True, ratio=2, style="dim")
    table.add_column("completion", no_wrap=True, ratio=3)
    table.add_column("accept length", justify="right")
    for row in _first_rows(out, limit):
        table.add_row(*(Text(one_line(cell)) for cell in _cells(row)))
    Console().print(table)


def _first_rows(out: Path, limit: int) -> Sequence[Row]:
    if out.suffix == ".jsonl":
        with out.open("rb") as lines:
            return [json.loads(line) for line in islice(lines, limit)]
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(out) as table:
        return (
            next(table.iter_batches(batch_size=limit)).to_pylist()
            if table.metadata.num_rows
            else []
        )


def _cells(row: Row) -> tuple[str, str, str, str]:
    answer = row.get("completion")
    if row.get("status") != "succeeded":
        error = row.get("error") or {}
        answer = f"{error.get('code')}: {error.get('message')}"
    speculation = (row.get("metrics") or {}).get("speculative_decoding") or {}
    accept_length = speculation.get("mean_acceptance_length")
    return (
        str(row.get("custom_id")),
        _prompt(row),
        answer or "",
        "" if accept_length is None else f"{accept_length:.2f}",
    )


def _prompt(row: Row) -> str:
    if row.get("prompt") is not None:
        return str(row["prompt"])
    messages = row.get("messages") or [{}]
    return str(messages[-1].get("content") or "")
