"""`dspark-batch export`: rows to another file, or to the Hub."""

import click

from dspark_batch.errors import UsageError
from dspark_batch.wording import count


@click.command("export")
@click.argument("out", metavar="OUT")
@click.argument("to", metavar="[TO]", required=False)
@click.option("--columns", metavar="A,B,...", help="Only these columns, in this order.")
@click.option(
    "--where",
    metavar="COLUMN=VALUE",
    multiple=True,
    help="Only rows with this value, such as finish_reason=length or error.code=engine; "
    "repeatable: one of them is enough.",
)
@click.option(
    "--inputs", is_flag=True, help="Not the rows, but the input records that they answer."
)
@click.option("--overwrite", is_flag=True, help="Replace TO if it is there.")
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Upload as a data set, with its card.")
@click.option("--license", "licence", metavar="ID", help="Of the data set; the card has no other.")
@click.option("--private", is_flag=True, help="Make a new data set private.")
def export_command(  # noqa: PLR0913  one for each option
    out: str,
    to: str | None,
    columns: str | None,
    where: tuple[str, ...],
    inputs: bool,
    overwrite: bool,
    push_to_hub: str | None,
    licence: str | None,
    private: bool,
) -> None:
    """Copy the rows of OUT to the file or URL TO, *.jsonl or *.parquet, or to the Hub.

    Of a job that is not finished, or still runs, TO has the rows that there are, in input order.
    Only a finished output can go to the Hub.
    """
    names = [name.strip() for name in columns.split(",")] if columns else []
    if to is None and push_to_hub is None:
        raise UsageError("nowhere to export to: name a file, or a data set with --push-to-hub.")
    if (inputs or where) and push_to_hub is not None:
        raise UsageError("--inputs and --where are for a file; drop them, or --push-to-hub.")
    if inputs and names:
        raise UsageError("--inputs takes whole records, to be run again; drop --columns.")
    if to is not None:
        click.echo(_written(out, to, names, where=where, inputs=inputs, overwrite=overwrite))
    if push_to_hub is not None:
        from dspark_batch.output import push

        address = push.push_to_hub(out, push_to_hub, names, licence=licence, private=private)
        click.echo(address)


def _written(
    out: str,
    to: str,
    names: list[str],
    *,
    where: tuple[str, ...],
    inputs: bool,
    overwrite: bool,
) -> str:
    """Write a file, and say what is in it."""
    from dspark_batch.output.export import export, export_inputs
    from dspark_batch.spec.where import read_where

    conditions = [read_where("--where", each) for each in where]
    if inputs:
        records = export_inputs(out, to, where=conditions, overwrite=overwrite)
        return f"{count(records)} record{'s' * (records != 1)} in {to}"
    rows = export(out, to, names, where=conditions, overwrite=overwrite)
    return f"{count(rows)} row{'s' * (rows != 1)} in {to}"
