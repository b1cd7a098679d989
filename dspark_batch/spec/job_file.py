"""Job files: the options of a run under their own names, in TOML."""

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from dspark_batch.errors import UsageError
from dspark_batch.spec.nearest import nearest
from dspark_batch.spec.spec import Spec

SUFFIX = ".toml"

Value: TypeAlias = bool | int | float | str | tuple[str, ...]

_HINT_BY_KEY = get_type_hints(Spec)
TEXTS = {"template", "system_prompt"}  # that @FILE may hold
CONTENTS = {"json_schema", "grammar"}  # that name a file, and mean what is in it
_FILES = ("inputs", "out")
_MODELS = ("target", "drafter")  # a directory if there is one, else a Hub id
_NEVER_HERE = "trust_remote_code"  # a job file may come from anybody
_ELSEWHERE = re.compile(r"-$|/|~|[a-zA-Z][a-zA-Z0-9+.-]*://")  # names that no directory changes
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def read_job(path: Path, today: date) -> dict[str, Any]:
    """Read the fields of a Spec that a job file sets.

    Names of files are relative to the job file, and `{date}` in them becomes `today`.

    Raises:
        UsageError: it cannot be read, or has a key or a value that no option has.
    """
    fields: dict[str, Any] = {
        key: _checked(path, key, value) for key, value in _parsed(path).items()
    }
    for key in fields.keys() & _FILES:
        fields[key] = _each(fields[key], lambda name: _located(path, _dated(path, name, today)))
    for key in fields.keys() & _MODELS:
        if (path.parent / fields[key]).is_dir():
            fields[key] = _located(path, fields[key])
    for key in fields.keys() & TEXTS:
        fields[key] = text_of(fields[key], path.parent)
    for key in fields.keys() & CONTENTS:
        fields[key] = content_of(fields[key], path.parent)
    return fields


def text_of(argument: str, folder: Path) -> str:
    """Read the file that `@FILE` names, without its last line end; else the argument is the text.

    `@@` stands for a text that begins with @.

    Raises:
        UsageError: the file cannot be read as text.
    """
    if not argument.startswith("@"):
        return argument
    if argument.startswith("@@"):
        return argument[1:]
    return content_of(argument[1:], folder, "what follows the @")


def content_of(name: str, folder: Path, said: str = "the name") -> str:
    """Read the text of a file, without its last line end.

    Args:
        name: of the file.
        folder: to which it is relative.
        said: what the user gave, for messages.

    Raises:
        UsageError: it cannot be read as text, or holds none.
    """
    path = folder / name
    try:
        text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); check {said}.") from error
    if not text.strip():
        raise UsageError(f"{path}: holds no text; check {said}.")
    return text


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML ({error}); repair it.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({reason}); check the path.") from error


def _checked(path: Path, key: str, value: Any) -> Value:  # noqa: ANN401  of TOML
    if isinstance(value, dict) and key not in _HINT_BY_KEY:
        raise UsageError(
            f"{path}: unknown key `{key}`, a table. Job files have no [sections]; leave out the "
            "heading."
        )
    if key not in _HINT_BY_KEY:
        raise UsageError(
            f"{path}: unknown key `{key}`{nearest(key, _HINT_BY_KEY)}. The keys are the options of "
            "`dspark-batch run`, with _ for -."
        )
    if key == _NEVER_HERE:
        raise UsageError(
            f"{path}: {key} cannot be allowed by a file; drop it, and say --trust-remote-code on "
            "the command line if you have read that code."
        )
    hint = _HINT_BY_KEY[key]
    if not _fits(value, hint):
        raise UsageError(f"{path}: {key} is {_toml(value)}, expected {_expected(hint)}.")
    return tuple(value) if isinstance(value, list) else value


def _fits(value: object, hint: object) -> bool:
    """Whether a TOML value is of a field's type; words out of a few are the Spec's to check."""
    if get_origin(hint) in (Union, UnionType) or NoneType in get_args(hint):
        return any(_fits(value, each) for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _expected(hint: Any) -> str:  # noqa: ANN401  any annotation
    if get_origin(hint) in (Union, UnionType) or NoneType in get_args(hint):
        kinds = (each for each in get_args(hint) if each is not NoneType)
        return " or ".join(map(_expected, kinds))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f'"{word}"' for word in get_args(hint))
    return _WORDS.get(hint, 'a list of strings, ["…"]')


def _toml(value: object) -> str:
    """Write a value as it stood in the file, if it is a short one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "a table" if isinstance(value, dict) else str(value)


def _each(names: str | tuple[str, ...], change: Callable[[str], str]) -> Value:
    return tuple(map(change, names)) if isinstance(names, tuple) else change(names)


def _dated(path: Path, name: str, today: date) -> str:
    for placeholder in re.findall(r"\{(\w*)\}", name):
        if placeholder != "date":
            raise UsageError(
                f"{path}: {name} has {{{placeholder}}}, but the only placeholder is {{date}}."
            )
    return name.replace("{date}", today.isoformat())


def _located(path: Path, name: str) -> str:
    if _ELSEWHERE.match(name):
        return name
    return os.path.normpath(path.parent / name)
