"""`dspark-batch pairs`: the registered pairs, and which of them are on this disk."""

from typing import TYPE_CHECKING

import click

from dspark_batch.wording import parameters, size, table

if TYPE_CHECKING:
    from dspark_batch.registry import RegisteredPair

_HEADINGS = ("family", "target", "drafter", "parameters", "memory", "thinking", "on disk")


@click.command("pairs")
def pairs_command() -> None:
    """List the pairs that --family knows, and which of them are on this disk."""
    from dspark_batch.registry import list_pairs

    pairs = list_pairs()
    click.echo(table(_HEADINGS, [_cells(pair) for pair in pairs]))
    click.echo()
    for source in dict.fromkeys(pair.source for pair in pairs):
        families = ", ".join(pair.family for pair in pairs if pair.source == source)
        click.echo(f"{families}: {source}.")
    click.echo(
        "Memory is for the weights as they are stored; --target-bits and --drafter-bits need less, "
        "long\ncontexts and many slots more. Other pairs: --target and --drafter."
    )


def _cells(pair: "RegisteredPair") -> tuple[str, ...]:
    return (
        pair.family,
        "(bundled)" if pair.bundled else pair.target,
        "(bundled)" if pair.bundled else pair.drafter,
        f"{parameters(pair.target_params)} + {parameters(pair.drafter_params)}",
        size(pair.memory_bytes),
        "yes" if pair.thinking else "no",
        pair.on_disk,
    )
