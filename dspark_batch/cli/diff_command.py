"""`dspark-batch diff`: two runs of the same input, item by item."""

from typing import TYPE_CHECKING

import click

from dspark_batch.cli.run_command import trust_option
from dspark_batch.wording import count, one_line, table

if TYPE_CHECKING:
    from dspark_batch.diff import Compared, Relation

_MOST_SHOWN = 20
_RELATIONS: tuple["Relation", ...] = ("same", "tied", "different", "only in A", "only in B")


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diff_command(a: str, b: str, *, trust_remote_code: bool, as_json: bool) -> int:
    """Compare the answers of two runs A and B of the same input.

    A and B are outputs or run directories, finished or not. Where answers part, the pair of A
    says how clear the choice was: a tie is what rounding can do. Exit code 3 if any answer is
    really different.
    """
    from dspark_batch.diff import diff

    found = diff(a, b, trust_remote_code=trust_remote_code)
    if as_json:
        import json
        from dataclasses import asdict

        counts = {relation: found.counts[relation] for relation in _RELATIONS}
        plain = {"a": found.a, "b": found.b, "settings": found.settings, "counts": counts}
        click.echo(json.dumps(plain | {"items": [asdict(item) for item in found.items]}))
        return found.exit_code
    counted = (f"{count(found.counts[name])} {name}" for name in _RELATIONS if found.counts[name])
    click.echo(click.style(", ".join(counted) or "No rows.", bold=True))
    for setting in found.settings:
        click.echo(f"setting: {setting}")
    if found.in_one_only:
        unfinished = "" if found.are_finished else ", or are not finished"
        click.echo(
            f"items in one run only: {count(found.in_one_only)}, because the runs have other "
            f"records or samples{unfinished}; an item is known by its id, content and sample"
        )
    if found.items:
        cells = [_cells(item) for item in found.items[:_MOST_SHOWN]]
        click.echo("\n" + table(("item", "is", "at", "A", "B", "margin"), cells))
    if len(found.items) > _MOST_SHOWN:
        click.echo(f"and {count(len(found.items) - _MOST_SHOWN)} more; --json has them")
    return found.exit_code


def _cells(item: "Compared") -> tuple[str, ...]:
    sample = f"/{item.sample_index}" if item.sample_index else ""
    return (
        one_line(f"{item.custom_id}{sample}"),
        item.relation,
        "" if item.position is None else str(item.position),
        one_line(item.a),
        one_line(item.b),
        "" if item.margin is None else f"{item.margin:.3g}",
    )
