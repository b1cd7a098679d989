"""JSON as people's files have it: what strict JSON has no place for is read, told, written again.

Such a value is an *oddity*: an integer beyond 64 bits, a number beyond a float, NaN or Infinity,
half a surrogate pair. A record may carry one through; only what is asked must be strict.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import orjson

from dspark_batch.types import Json

_LONG_NUMBER = re.compile(rb"\d{19}")
_MOST_DIGITS = 4300  # that Python makes an integer of
_SPACE_AND_COMMA, _COLON = re.compile(r"[\s,]*"), re.compile(r"\s*:\s*")
_END_OF_VALUE = re.compile(r"\s*[,}]")
_KEY = re.compile(rb'"\s*:')  # the end of a key; inside text it may be none


class Parsed(NamedTuple):
    """What a line holds."""

    record: dict[str, Json]  # the columns; where there is a problem, those that could be read
    notes: tuple[str, ...] = ()  # its oddities
    problem: str | None = None  # why it is no record; None: it is one


class _AsText(str):
    """A number that is kept as its digits."""


def parse(line: bytes) -> Parsed:
    """Read one line; an object with a key twice is refused, as nobody can tell which one counts."""
    found = _parse(line)
    twice = [] if found.problem is not None else keys_twice(line, found.record)
    if not any(twice):
        return found
    record = {name: value for name, value in found.record.items() if name not in twice[-1]}
    return Parsed(record, found.notes, said_twice(twice))


def _parse(line: bytes) -> Parsed:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _leniently(line, f"not JSON ({error}); repair the line.")
    if not isinstance(value, dict):
        expected = 'expected a JSON object such as {"prompt": "…"}'
        return Parsed({}, (), f"{expected}, found {kind_of(value)}.")
    if _LONG_NUMBER.search(line):  # orjson makes floats of the longest ones
        found = _leniently(line, "nested too deep; make it flat.")
        return found if found.notes or len(found.record) < len(value) else Parsed(value)
    return Parsed(value)


def keys_twice(text: bytes, value: Json) -> list[list[str]]:
    """Name the keys that stand twice in each object of JSON, the outermost object last.

    Args:
        text: the JSON.
        value: what was read of it. Where it has as many keys as the text seems to have, none can
            be there twice, so most texts are read only once.
    """
    if len(_KEY.findall(text)) == _num_keys(value):
        return []
    twice: list[list[str]] = []

    def see(pairs: list[tuple[str, Json]]) -> None:
        twice.append([name for name, times in Counter(n for n, _ in pairs).items() if times > 1])

    try:
        json.loads(text, object_pairs_hook=see, parse_int=str, parse_float=str)
    except RecursionError:  # deeper than any conversation
        return []
    return twice


def said_twice(twice: Sequence[Sequence[str]]) -> str:
    """Say which key stands twice."""
    name = next(filter(None, reversed(twice)))[0]
    return f"the key `{sayable(name)}` stands twice in one object; keep one of them."


def dump(value: Json, *, is_odd: bool) -> bytes:
    """Write JSON in one line; what is odd comes out as it came in."""
    if not is_odd:
        return orjson.dumps(value)
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def sayable(text: str) -> str:
    """Write half surrogate pairs as their numbers, for a message that quotes them."""
    return text.encode(errors="backslashreplace").decode()


def kind_of(value: Json) -> str:
    """Name the JSON type of a value as people say it."""
    names = {
        "NoneType": "null",
        "bool": "a boolean",
        "int": "a number",
        "float": "a number",
        "list": "a list",
        "dict": "an object",
    }
    return names.get(type(value).__name__, "a string")


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: it has no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leniently(line: bytes, problem: str) -> Parsed:
    """Read what strict JSON refuses; if no oddity explains that, there is a problem."""
    text = line.decode(errors="surrogateescape")
    try:
        record: Json = _loads(text)
        is_whole = is_utf8(line)
    except (ValueError, RecursionError):
        record, is_whole = None, False
    if not isinstance(record, dict) or not is_whole:
        is_whole, record = (
            False,
            {name: value for name, value in _pairs(text) if "\\udc" not in ascii([name, value])},
        )
    columns, notes = {}, []
    for name, value in record.items():
        try:
            oddity = _oddity(value)
        except RecursionError:
            is_whole = False
            continue
        if not is_text(name):
            is_whole, problem = False, f"a column is named {name!a}, which is no text; rename it."
            continue
        columns[name] = value
        notes += [f"`{name}` holds {oddity}"] if oddity else []
    return Parsed(columns, tuple(notes), None if is_whole and notes else problem)


def is_utf8(line: bytes) -> bool:
    """Whether bytes are text."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) < _MOST_DIGITS else _AsText(digits)


def _number(digits: str) -> float | str:
    return float(digits) if math.isfinite(float(digits)) else _AsText(digits)


_LENIENT = json.JSONDecoder(parse_int=_integer, parse_float=_number, strict=False)


def _loads(text: str) -> Json:
    return json.loads(text, parse_int=_integer, parse_float=_number)


def _pairs(text: str) -> Iterator[tuple[str, Json]]:
    """Yield the columns of an object up to where it cannot be read any more."""
    place = text.find("{") + 1
    if text[:place].strip() != "{":
        return
    try:
        while True:
            before = _SPACE_AND_COMMA.match(text, place)  # always: it may be empty
            name, place = _LENIENT.raw_decode(text, before.end() if before else place)
            colon = _COLON.match(text, place)
            if not isinstance(name, str) or colon is None:
                return
            value, place = _LENIENT.raw_decode(text, colon.end())
            if _END_OF_VALUE.match(text, place) is None:  # a number may have lost its end
                return
            yield name, value
    except (ValueError, RecursionError):
        return


def _num_keys(value: Json) -> int:
    """Count the keys of all objects in a value."""
    found, rest = 0, [value]
    for each in rest:  # which grows
        if isinstance(each, dict):
            found += len(each)
            rest += each.values()
        elif isinstance(each, list):
            rest += each
    return found


def _oddity(value: Json) -> str | None:
    """Name the first value that strict JSON has no place for; None: there is none."""
    if isinstance(value, _AsText):
        return "a number too large to compute with, which is kept as text"
    if isinstance(value, str):
        return None if is_text(value) else "half a surrogate pair"
    if isinstance(value, float):
        return None if math.isfinite(value) else "NaN or Infinity"
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**64 else "an integer beyond 64 bits"
    if isinstance(value, Mapping):
        return next(filter(None, map(_oddity, (*value, *value.values()))), None)
    return next(filter(None, map(_oddity, value)), None) if isinstance(value, list) else None
