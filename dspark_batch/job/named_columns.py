"""Columns that the options name: a name that no record has is a mistake, found before any work."""

from collections.abc import Iterator, Mapping
from dataclasses import fields

from dspark_batch.errors import UsageError
from dspark_batch.job.choices import COLUMN
from dspark_batch.job.files import Wanted
from dspark_batch.job.mapping import CONVERSATIONS, TURNS, has_prompt
from dspark_batch.job.messages import listed
from dspark_batch.job.nearest import nearest
from dspark_batch.job.rows import layout_of
from dspark_batch.job.spec import Spec
from dspark_batch.job.template import ALL, columns_in
from dspark_batch.types import Json

_PROMPTS = ("prompt_column", "messages_column")
_KNOWN = ("custom_id", "id", "method", "url", "body", COLUMN)  # asked by their own names


class NamedColumns:
    """Looks at every record for what the options name."""

    def __init__(self, spec: Spec) -> None:
        """Remember what to look for.

        Raises:
            UsageError: the template is not Jinja.
        """
        self._spec = spec
        self._unseen = dict(_named(spec))  # column -> the option that names it
        self._has_prompt = spec.template is not None
        self._first: Mapping[str, Json] = {}  # the first record that has columns

    def see(self, record: Mapping[str, Json]) -> None:
        """Look at the columns of one record."""
        self._first = self._first or record
        self._has_prompt = self._has_prompt or has_prompt(record, self._spec)
        for column in self._unseen.keys() & record.keys():
            del self._unseen[column]

    def check(self, where: str) -> None:
        """Refuse a name that no record had, unless there were no records to look at.

        Raises:
            UsageError: naming the option, and the column that was probably meant.
        """
        if not self._first:
            return
        columns = f"columns are {listed(self._first)}"
        for column, option in self._unseen.items():
            raise UsageError(
                f"{option} names a column `{column}` that no record of {where} has"
                f"{nearest(column, self._first)}; {columns}."
            )
        if not self._has_prompt:
            raise UsageError(
                f"{where}: no record has a `{self._spec.prompt_column}`, or another known shape of "
                f"a prompt; {columns}; name the right one with --prompt-column or "
                "--messages-column."
            )


def wanted_columns(spec: Spec) -> Wanted:
    """Say what a job wants of the columns of its inputs."""
    names = {*_KNOWN, spec.report_by} | columns_in(spec.template or "")
    if spec.template is None:
        names |= {spec.prompt_column, spec.messages_column, CONVERSATIONS, TURNS}
    asks_any = ALL in (spec.template or "")  # all columns at once, so any of them
    layout = layout_of(spec)
    return Wanted(
        asks=lambda column: asks_any or column in names,
        passes=lambda column: spec.format == "rows" and layout.has(column),
    )


def _named(spec: Spec) -> Iterator[tuple[str, str]]:
    default = {field.name: field.default for field in fields(Spec)}
    for name in _PROMPTS:
        if spec.template is None and getattr(spec, name) != default[name]:
            yield getattr(spec, name), f"--{name.replace('_', '-')}"
    for column in columns_in(spec.template or ""):
        yield column, "--template"
    for name in ("keep", "drop"):
        for column in getattr(spec, name):
            yield column, f"--{name}"
