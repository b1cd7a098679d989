"""`dspark-batch report`: the page of a job, from what its run directory holds."""

import click


@click.command("report")
@click.argument("out", metavar="OUT")
@click.option("--report-by", metavar="COLUMN", help="Compare the values of this input column.")
def report_command(out: str, report_by: str | None) -> None:
    """Write OUT.run/report.html: the job that made OUT, in pictures.

    The page opens offline. A job that is not finished has one too, of the rows there are.
    """
    from dspark_batch.report import write_report

    click.echo(write_report(out, report_by))
