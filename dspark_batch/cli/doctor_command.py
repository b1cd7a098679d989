"""`dspark-batch doctor`: this machine as a run would find it, and what is wrong with it."""

import click

_LABEL_WIDTH = 17


@click.command("doctor")
@click.option(
    "--forget",
    "is_to_forget",
    is_flag=True,
    help="First drop what is kept about machines; the next run finds it out again.",
)
def doctor_command(*, is_to_forget: bool) -> int:
    """Say what a run would find here, what is wrong, and what to do.

    Asks no network. The exit code is 0 if nothing is wrong, else 1.
    """
    from dspark_batch.doctor import diagnose, forget

    if is_to_forget:
        click.echo(f"forgot {forget()}")
    found = diagnose()
    for section, facts in found.sections.items():
        click.secho(section, bold=True)
        for name, fact in facts.items():
            click.echo(f"  {name:<{_LABEL_WIDTH}}{fact}")
    for sentence in found.hints:
        click.echo(f"hint: {sentence}")
    for sentence in found.problems:
        click.echo(f"wrong: {sentence}")
    click.echo("All is well." if found.usable else f"Problems: {len(found.problems)}.")
    return 0 if found.usable else 1
