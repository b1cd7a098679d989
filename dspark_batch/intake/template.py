"""Prompts written as Jinja over the columns of a record, in a sandbox.

A template writes what the record says, as JSON where it is no text, and nothing of Python: no
method, no null, no repr.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import (
    StrictUndefined,
    Template,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
    meta,
    nodes,
    pass_environment,
)
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dspark_batch.errors import UsageError
from dspark_batch.intake.messages import Unusable, listed
from dspark_batch.types import Json

ALL = "row"  # all columns under one name, for names that are no words: {{ row["my column"] }}

_MISTAKES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)
_KINDS = {"Object": "an object", "List": "a list", "Null": "a null"}
_OUR_TYPES = re.compile(r"'(?:[a-z_]+\.)*_(Object|List|Null)(?: object)?'(?: object)?")


class _NullError(ValueError):
    """A template that would write out a null as a word."""


class _Object(dict[str, object]):
    """An object of a record, which reads as JSON wherever it becomes text."""

    def __repr__(self) -> str:
        return _json(self)


class _List(list[object]):
    """A list of a record, which reads as JSON wherever it becomes text."""

    def __repr__(self) -> str:
        return _json(self)


class _Null:
    """A null of a record: it can be tested, and is no text."""

    def __repr__(self) -> str:
        raise _NullError

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return _is_null(other)

    def __hash__(self) -> int:
        return hash(None)


class _Method:
    """A method of a value: it can be called, and is no text."""

    def __init__(self, method: Callable[..., object], name: str) -> None:
        self._method, self._name = method, name

    def __call__(self, *args: object, **named: object) -> object:
        return self._method(*args, **named)

    def __str__(self) -> str:
        raise ValueError(f"it writes out the method `{self._name}`; call it, or name a column")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja for which a value is what JSON says it is."""

    def getattr(self, obj: object, attribute: str) -> object:
        """Look up `x.y`: an item before a method of Python's."""
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        value = super().getattr(obj, attribute)
        is_method = callable(value) and not isinstance(value, Undefined)
        return _Method(value, attribute) if is_method else value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Let `a ~ b` write its parts as `{{ a }}{{ b }}` does."""
        tree = super()._parse(source, name, filename)
        for each in tree.find_all(nodes.Concat):
            each.nodes = [nodes.Filter(n, "string", [], [], None, None) for n in each.nodes]
        return tree


def prompt_of(template: str, record: Mapping[str, Json]) -> str:
    """Render a template over a record.

    Raises:
        Unusable: the record does not fit it.
    """
    if ALL in record and _takes_all_at_once(template):
        raise Unusable(
            f"`{ALL}` in the template is all columns, and one of them is called `{ALL}`; write "
            f"`{ALL}.{ALL}` for that one."
        )
    try:
        columns = _spoken(record)
        text = _compiled(template).render({**columns, ALL: columns})
    except UndefinedError as error:
        raise Unusable(
            f"the template asks for what this record lacks ({_plainly(error)}); columns are "
            f"{listed(record)}."
        ) from error
    except _NullError as error:
        raise Unusable("the template writes out a null; test the column with {% if %}.") from error
    except _MISTAKES as error:
        raise Unusable(f"the template does not fit this record ({_plainly(error)}).") from error
    if not text.strip():
        raise Unusable("the template renders to blanks; there is nothing to answer.")
    return text


def _plainly(error: Exception) -> str:
    """Say an error of Jinja's in the words of JSON."""
    said = _OUR_TYPES.sub(lambda found: _KINDS[found[1]], str(error))
    return said.replace("a StrictUndefined is not JSON", "a field that is not there is not JSON")


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


@lru_cache(maxsize=8)
def _takes_all_at_once(template: str) -> bool:
    """Whether a template takes all columns as one value, and not one of them: `row.x`."""
    tree = _environment().parse(template)
    ones: list[nodes.Getattr | nodes.Getitem] = [*tree.find_all(nodes.Getattr)]
    ones += [each for each in tree.find_all(nodes.Getitem) if isinstance(each.arg, nodes.Const)]
    names = {id(each.node) for each in ones}
    return any(n.name == ALL and id(n) not in names for n in tree.find_all(nodes.Name))


def _environment() -> _Environment:
    environment = _Environment(undefined=StrictUndefined, finalize=_written, autoescape=False)
    environment.filters |= {"string": _written, "join": _joined, "tojson": _json}
    environment.tests |= {"none": _is_null}
    return environment


def _spoken(value: Json) -> Any:  # noqa: ANN401  as `render` takes it
    """Let the values of a record read as JSON."""
    if value is None:
        return _Null()
    if isinstance(value, Mapping):
        return _Object((name, _spoken(each)) for name, each in value.items())
    return _List(map(_spoken, value)) if isinstance(value, list) else value


def _written(value: object) -> str:
    """Write a value into the prompt.

    Raises:
        ValueError: it is nothing that a record can say.
    """
    if _is_null(value):
        raise _NullError
    if isinstance(value, str | Undefined | _Method):  # the last two say themselves what is wrong
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it writes out {value}, which is no number")
    if isinstance(value, bool | int | float | list | dict | tuple):
        return _json(value)
    raise ValueError(f"it writes out a {type(value).__name__}, which is no value of a record")


def _is_null(value: object) -> bool:
    return value is None or isinstance(value, _Null)


@pass_environment
def _joined(
    environment: _Environment,
    value: Iterable[object],
    d: object = "",
    attribute: str | int | None = None,
) -> str:
    """Join values as Jinja's filter of this name does, each written as `{{ }}` writes it."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return str(d).join(map(_written, value))


def _json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write plain JSON, keys in their order; the arguments are those of chat templates."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        allow_nan=False,
        default=_null_or_refuse,
    )


def _null_or_refuse(value: object) -> None:
    if not _is_null(value):
        raise TypeError(f"a {type(value).__name__} is not JSON")
