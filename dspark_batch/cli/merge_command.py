"""`dspark-batch merge`: the outputs of all shards as one."""

import click


@click.command("merge")
@click.argument("out", metavar="OUT")
@click.argument("shards", metavar="SHARD...", nargs=-1, required=True)
@click.option("--overwrite", is_flag=True, help="Discard what OUT and OUT.run hold.")
@click.option("-q", "--quiet", is_flag=True, help="No summary; warnings and errors still show.")
def merge_command(out: str, shards: tuple[str, ...], *, overwrite: bool, quiet: bool) -> int:
    """Join the outputs SHARD... of `run --shard` to OUT, as one process would have written it.

    All shards must be there, finished, and of one job: same input, options, models and numerics.
    The input is read again. OUT is then a job like any other. Exit code 75: one is not finished.
    """
    from dspark_batch.cli.run_command import tell_end
    from dspark_batch.merge import merge

    report = merge(out, shards, overwrite=overwrite)
    tell_end(report, out, quiet=quiet)
    return report.exit_code
