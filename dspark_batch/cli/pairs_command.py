"""`dspark-batch pairs`: the registered pairs, and which of them are on this disk."""

from typing import TYPE_CHECKING

import click

from dspark_batch.wording import parameters, size, table

if TYPE_CHECKING:
    from dspark_batch.registry import RegisteredPair

_HEADINGS = ("family", "target", "drafter", "parameters", "memory", "slot", "thinking", "on disk")


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
        "Memory is for the weights as they are stored; --target-bits and --drafter-bits need less. "
        "A + says\nthat the size of the drafter is not known here. A slot of the target's cache "
        "takes so much for each\ntoken of prompt and answer, and for its states. "
        "Other pairs: --target and --drafter."
    )


def _cells(pair: "RegisteredPair") -> tuple[str, ...]:
    drafter = "?" if pair.drafter_params is None else parameters(pair.drafter_params)
    states = f" and {size(pair.state_bytes)}" if pair.state_bytes else ""
    return (
        pair.family,
        "(bundled)" if pair.bundled else pair.target,
        "(bundled)" if pair.bundled else pair.drafter,
        f"{parameters(pair.target_params)} + {drafter}",
        size(pair.memory_bytes) + ("+" if pair.drafter_params is None else ""),
        f"{size(pair.position_bytes)} a token" + states,
        "yes" if pair.thinking else "no",
        pair.on_disk,
    )
