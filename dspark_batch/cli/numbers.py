"""Numbers on the command line: click's own ranges call a word "not a valid integer range"."""

from typing import Any, get_args

import click

from dspark_batch.spec.spec import Auto


class Whole(click.IntRange):
    """A whole number in a range."""

    name = "integer"


class Number(click.FloatRange):
    """A number in a range."""

    name = "number"


class WholeOrAuto(Whole):
    """A whole number in a range, or auto."""

    def convert(  # type: ignore[override]  # click's own gives a number and nothing else
        self,
        value: Any,  # noqa: ANN401  as click has it
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> int | str:
        """Return the word or the number."""
        if value in get_args(Auto):
            return value
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.removesuffix('.')}; give a number, or auto.", param, ctx)
