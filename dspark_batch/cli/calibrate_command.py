"""`dspark-batch calibrate`: what the confidences of a pair mean, from the log of a run."""

import click


@click.command("calibrate")
@click.argument("out", metavar="OUT")
def calibrate_command(out: str) -> None:
    """Fit the confidences of the pair that made OUT, and keep the result for this pair.

    OUT is the output of a run with --log-confidence. From then on --confidence-threshold means
    what it says: how likely a draft must be to stay.
    """
    from dspark_batch.calibrate import calibrate

    fitted = calibrate(out)
    click.echo("position  temperature  error before  error after")
    by_position = zip(fitted.temperatures, fitted.error_before, fitted.error_after, strict=False)
    for position, (temperature, before, after) in enumerate(by_position, 1):
        click.echo(f"{position:8}  {temperature:11.2f}  {before:12.1%}  {after:11.1%}")
    kept = f"kept in {fitted.path}" if fitted.path else "not kept, the error does not fall"
    click.echo(f"from {fitted.num_rounds:,} rounds; {kept}")
