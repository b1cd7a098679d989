"""Prompts written as Jinja over the columns of a record, in a sandbox."""

from collections.abc import Mapping
from functools import lru_cache

from jinja2 import (
    StrictUndefined,
    Template,
    TemplateError,
    TemplateSyntaxError,
    UndefinedError,
    meta,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dspark_batch.errors import UsageError
from dspark_batch.job.messages import Unusable, listed
from dspark_batch.types import Json

ALL = "row"  # all columns under one name, for names that are no words: {{ row["my column"] }}

_MISTAKES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)


class _NullError(ValueError):
    """A template that would write out a null as a word."""


def prompt_of(template: str, record: Mapping[str, Json]) -> str:
    """Render a template over a record.

    Raises:
        Unusable: the record does not fit it.
    """
    try:
        text = _compiled(template).render({ALL: record} | record)
    except UndefinedError as error:
        raise Unusable(
            f"the template asks for what this record lacks ({error}); columns are {listed(record)}."
        ) from error
    except _NullError as error:
        raise Unusable("the template writes out a null; test the column with {% if %}.") from error
    except _MISTAKES as error:
        raise Unusable(f"the template does not fit this record ({error}).") from error
    if not text.strip():
        raise Unusable("the template renders to blanks; there is nothing to answer.")
    return text


def columns_in(template: str) -> set[str]:
    """Find the columns that a template asks for.

    Raises:
        UsageError: it is not Jinja.
    """
    try:
        return meta.find_undeclared_variables(_environment().parse(template)) - {ALL}
    except TemplateSyntaxError as error:
        raise UsageError(
            f"template, line {error.lineno}: not Jinja ({error.message}); repair it."
        ) from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_not_null, autoescape=False
    )


def _not_null(value: object) -> object:
    if value is None:
        raise _NullError
    return value
