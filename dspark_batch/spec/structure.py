"""What an answer must look like: JSON of a schema, or text of a grammar.

    structure_of("json_schema", {"type": "object", "properties": {"age": {"type": "integer"}}})

Everything is checked when it is read, without a model: over bytes in place of tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from dspark_batch.types import Json, Structure, StructureKind

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

KINDS: tuple[StructureKind, ...] = ("json_schema", "regex", "grammar", "choice")
ANY_OBJECT: Json = {"type": "object"}

Schema: TypeAlias = Json

_MOST_BYTES = 1_000_000
_DISTINCT = 256  # structures that are remembered
# Between two parts of JSON: nothing, a blank, or a line break and an indentation. So a target may
# write as it likes to, and cannot go on with blanks for ever.
_LAID_OUT: "JsonCompileOptions" = {"whitespace_pattern": r"( |\n[ \t]{0,12})?"}
# Behind it, a line break may stand. Targets have a token for a bracket with one, and where that
# may not come they write blanks for as long as they may.
_WHOLE = {"lark_grammar": 'start: @json_schema "\\n"?'}
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_ONE_OF_MANY = ("anyOf", "oneOf")
# With these an object's properties stand in several places, so that none of them knows all.
_JOINED = ("allOf", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef")
_TOO_DEEP = "is nested too deeply; make it flatter"
_TOO_LARGE = "is too large to be followed"
_SENTENCES = {  # by what llguidance says
    "NoExtension": "allows no answer at all; loosen it",
    "recursion limit": _TOO_DEEP,
    "Resource '([^']*)'": "has the `$ref` `{found}`, and nothing is fetched; copy it into `$defs`",
    "oneOf constraints": "has `oneOf` with branches that overlap, which is not supported; use "
    "`anyOf`",
    "Unknown format: (.*)": "has the `format` `{found}`, which is not supported; leave it out",
    "too (?:many|large|big|complex)": _TOO_LARGE + " ({first}); make it smaller",
    "Unsatisfiable.*?: (.*)": "allows no answer at all ({found}); loosen it",
}
_PROBED = 64  # bytes of an answer that are tried
_MOST_WORK = 200_000  # of llguidance for one regular expression; its own limit takes a second
_SCALARS = {"string", "number", "integer", "boolean", "null"}


def structure_of(kind: StructureKind, value: Json) -> Structure:
    """Read a structure and check it.

    Args:
        kind: what it is.
        value: a schema, as JSON or as its text; a regular expression of the whole answer; a Lark
            grammar; or a list of texts, of which the answer is one.

    Raises:
        ValueError: what is wrong with it, as half a sentence behind its name.
    """
    made = _made(kind, _text_of(kind, value))
    if isinstance(made, str):
        raise ValueError(made)
    return made


def schema_of(text: str) -> Schema:
    """Read the text of a schema; its objects have only the properties that it names.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        schema: Schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error}); repair it") from error
    if not isinstance(schema, bool | Mapping):
        raise ValueError(f"is {_short(schema)}, expected a JSON Schema")
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return _closed(schema) if _can_close(schema) else schema


def _text_of(kind: StructureKind, value: Json) -> str:
    if kind == "json_schema":
        is_schema = isinstance(value, str | bool | Mapping)
        text = value if isinstance(value, str) else _dumped(value)
        expected = "a JSON Schema"
    elif kind == "choice":
        texts = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        is_schema = bool(texts) and all(isinstance(each, str) and each for each in texts)
        text, expected = _dumped(list(texts)), "a list of texts that are not empty"
    else:
        is_schema, text = isinstance(value, str) and bool(value), str(value)
        expected = "a text that is not empty"
    if not is_schema:
        raise ValueError(f"is {_short(value)}, expected {expected}")
    return text


def _short(value: Json) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


@lru_cache(_DISTINCT)
def _made(kind: StructureKind, text: str) -> Structure | str:
    """Make and check a structure once, however many items have it; a text says why it is none."""
    if len(text) > _MOST_BYTES:
        size = f"{len(text) / 1e6:.1f} MB long, expected at most {_MOST_BYTES / 1e6:.0f}"
        return f"is {size}; give a smaller one"
    try:
        grammar = _grammar(kind, text)
    except ImportError:
        return "needs llguidance; install it with `pip install '.[structured]'`"
    except RecursionError:
        return _TOO_DEEP
    except ValueError as error:
        return str(error)
    return _problem(grammar) or Structure(kind, grammar)


def _grammar(kind: StructureKind, text: str) -> str:
    """Write a structure in llguidance's words."""
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(text)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_dumped, json.loads(text))))
    schema = schema_of(text)
    _refuse_endless(schema)
    _refuse_large(schema)
    try:
        made = LLMatcher.grammar_from_json_schema(_dumped(schema), overrides=_LAID_OUT)
    except ValueError as error:
        raise ValueError(_in_words(str(error))) from error
    return _dumped({"grammars": [_WHOLE, *json.loads(made)["grammars"]]})


def _dumped(value: Json) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def _problem(grammar: str) -> str | None:
    """Say why a grammar allows no answer; None: it allows one."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=_MOST_WORK)
    matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=limits)
    for _ in range(_PROBED):  # what grows too large does so where it begins
        if matcher.is_error():
            return _in_words(matcher.get_error())
        allowed = matcher.compute_bitmask()
        if matcher.is_error():
            return _in_words(matcher.get_error())
        byte = next((byte for byte in range(256) if allowed[byte // 8] >> byte % 8 & 1), None)
        if byte is None:  # it ends
            return None
        matcher.consume_token(byte)
    return None


@lru_cache(1)
def _bytes() -> "LLTokenizer":
    """Make a vocabulary of single bytes."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _in_words(error: str) -> str:
    """Make one sentence of llguidance's error."""
    first, *_ = error.strip().splitlines() or [error]
    if found := re.search(r"Unimplemented keys: \[(.*)\]", first):
        names = ", ".join(f"`{name}`" for name in re.findall(r'"([^"]+)"', found[1]))
        return f"has {names}, which is not supported; say it with other keywords"
    for pattern, sentence in _SENTENCES.items():
        if found := re.search(pattern, first, re.IGNORECASE):
            return sentence.format(first=first, found=found[found.re.groups])
    last = re.findall(r"^error: (.*)$", error, re.MULTILINE)
    return f"cannot be followed ({last[0] if last else first}); repair it"


def _schemas(schema: Schema) -> Iterator[Mapping[str, Json]]:
    """Walk over a schema and all that is in it; objects of other kinds come too."""
    waiting: list[Json] = [schema]
    while waiting:
        here = waiting.pop()
        if isinstance(here, Mapping):
            yield here
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here


def _can_close(schema: Schema) -> bool:
    """Whether each object of a schema is described in one place."""
    for here in _schemas(schema):
        elsewhere = any(name in here for name in (*_ONE_OF_MANY, "$ref"))
        if any(name in here for name in _JOINED) or ("properties" in here and elsewhere):
            return False
    return True


def _closed(schema: Schema) -> Schema:
    """Leave an object only the properties that are named, unless it says what others may be.

    What such a schema allows, the schema as it was given allows too.
    """
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed: dict[str, Json] = {}
    for name, value in schema.items():
        if name in _BY_NAME and isinstance(value, Mapping):
            closed[name] = {each: _closed(inner) for each, inner in value.items()}
        else:
            closed[name] = value if name in ("const", "enum", "default") else _closed(value)
    if isinstance(schema.get("properties"), Mapping) and "patternProperties" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _refuse_endless(schema: Schema) -> None:
    """Refuse a schema whose every answer would have itself as a part.

    Raises:
        ValueError: it is such a one.
    """
    targets = {ref: target_of(schema, ref) for ref in _refs(schema)}
    ending: set[str] = set()  # references to what can end
    while True:
        more = {ref for ref in targets.keys() - ending if _ends(targets[ref], ending, targets)}
        if not more:
            break
        ending |= more
    if not _ends(schema, ending, targets):
        endless = sorted(targets.keys() - ending)
        raise ValueError(
            f"has the `$ref` `{endless[0]}` inside itself without an end; let it be left out, or "
            "allow something else in its place"
        )


def _refuse_large(schema: Schema) -> None:
    """Refuse a pattern that explodes where it begins, wherever that is in an answer.

    Raises:
        ValueError: there is one.
    """
    from llguidance import LLMatcher

    for here in _schemas(schema):
        if isinstance(pattern := here.get("pattern"), str):
            text = pattern.removeprefix("^").removesuffix("$")
            problem = _problem(LLMatcher.grammar_from_regex(text)) if text else None
            if problem and problem.startswith(_TOO_LARGE):
                raise ValueError(f"has a `pattern` that {problem}")


def _refs(schema: Schema) -> set[str]:
    named = (here.get("$ref") for here in _schemas(schema))
    return {ref for ref in named if isinstance(ref, str)}


def target_of(schema: Schema, ref: str) -> Schema:
    """Find what a reference within a schema means; True, which ends: it is another kind."""
    here: Any = schema
    if not ref.startswith("#"):
        return True
    for step in filter(None, ref[1:].split("/")):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(here, Mapping) and name in here:
            here = here[name]
        elif isinstance(here, list) and name.isdigit() and int(name) < len(here):
            here = here[int(name)]
        else:
            return True
    return here


def _ends(schema: Schema, ending: set[str], targets: Mapping[str, Schema]) -> bool:
    """Whether an answer to a schema can end, if references lead to an end as `ending` says."""
    if not isinstance(schema, Mapping) or "const" in schema or "enum" in schema:
        return True
    ref, every = schema.get("$ref"), schema.get("allOf")
    if isinstance(ref, str) and ref in targets and ref not in ending:
        return False
    if isinstance(every, list) and not all(_ends(each, ending, targets) for each in every):
        return False
    for name in _ONE_OF_MANY:
        some = schema.get(name)
        if isinstance(some, list) and not any(_ends(each, ending, targets) for each in some):
            return False
    kinds = schema.get("type", sorted(_SCALARS))
    if not _SCALARS.isdisjoint([kinds] if isinstance(kinds, str) else _texts(kinds)):
        return True
    return all(_ends(part, ending, targets) for part in _needed(schema))


def _texts(value: Json) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _needed(schema: Mapping[str, Json]) -> Iterator[Schema]:
    """Yield the schemas of the parts that an object or an array must have."""
    properties, required = schema.get("properties"), _texts(schema.get("required"))
    if isinstance(properties, Mapping):
        yield from (properties[name] for name in required if name in properties)
    least, first = schema.get("minItems"), schema.get("prefixItems")
    if isinstance(least, int | float) and least > 0 and schema.get("type") == "array":
        before = first[: int(least)] if isinstance(first, list) else []
        yield from before
        if len(before) < least:
            yield schema.get("items")
