"""What an answer may look like: read once, checked without a model, refused in one sentence."""

import json
import random
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from dspark_batch.errors import UsageError
from dspark_batch.spec.spec import Spec
from dspark_batch.spec.structure import schema_of, structure_of

ITSELF = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        ("json_schema", '{"type":', "is not JSON"),
        ("json_schema", 3, "is 3, expected a JSON Schema"),
        ("json_schema", "[1]", r"is \[1\], expected a JSON Schema"),
        ("json_schema", {"x": "a" * 5_000_000}, "is 5.0 MB long, expected at most 1; give a"),
        ("json_schema", deep(300), "is nested too deeply; make it flatter"),
        ("json_schema", deep(5000), "is nested too deeply; make it flatter"),
        ("json_schema", {"$ref": "https://a.example/b"}, "`https://a.example/b`, and nothing"),
        ("json_schema", {"$ref": "#/nowhere"}, "cannot be followed .Pointer '/nowhere' does not"),
        ("json_schema", {"uniqueItems": True}, "has `uniqueItems`, which is not supported"),
        ("json_schema", {"oneOf": [{"minimum": 1}, {"minimum": 2}]}, "has `oneOf` with branches"),
        ("json_schema", {"type": "string", "format": "iri"}, "has the `format` `iri`, which is"),
        ("json_schema", {"type": "strng"}, "cannot be followed .Invalid type: strng"),
        ("json_schema", {"$ref": "#"}, "has the `[$]ref` `#` inside itself without an end"),
        ("json_schema", ITSELF, "has the `[$]ref` `#` inside itself without an end"),
        ("json_schema", {"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "without an end"),
        ("json_schema", False, "allows no answer at all"),
        ("json_schema", {"minLength": 3, "maxLength": 2, "type": "string"}, "allows no answer at"),
        ("json_schema", {"pattern": "(a{1000}){1000}"}, "has a `pattern` that is too"),
        ("regex", "(a{1000}){1000}", "is too large to be followed"),
        ("regex", "a{100000}", "is too large to be followed"),
        ("regex", "[a-z", "cannot be followed .unclosed character class"),
        ("regex", "(?=a)b", "cannot be followed .look-around"),
        ("regex", r"[^\s\S]", "allows no answer at all"),
        ("regex", "", "is '', expected a text that is not empty"),
        ("grammar", "begin: /a/", "cannot be followed .no start rule found"),
        ("grammar", "start: start", "allows no answer at all"),
        ("grammar", 'start: "a" start', "is too large to be followed"),
        ("choice", [], "expected a list of texts that are not empty"),
        ("choice", ["a", ""], "expected a list of texts that are not empty"),
        ("choice", "yes", "is 'yes', expected a list"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_sentence(kind, value, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        structure_of(kind, value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"anyOf": [{"type": "null"}, ITSELF | {"properties": {"next": {"$ref": "#"}}}]},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
)
def test_a_schema_inside_itself_may_end(schema):
    structure_of("json_schema", schema)


def test_an_object_has_only_the_properties_that_are_named():
    nested = '{"type": "object", "properties": {"a": {"properties": {"b": {}}, "type": "object"}}}'
    closed = schema_of(nested)
    assert closed["additionalProperties"] is closed["properties"]["a"]["additionalProperties"]
    assert closed["additionalProperties"] is False


@pytest.mark.parametrize(
    "text",
    [
        '{"properties": {"a": {}}, "additionalProperties": true}',
        '{"properties": {"a": {}}, "patternProperties": {"^x": {}}}',
        '{"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}',
        '{"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}',
        '{"enum": [{"properties": {}}]}',
    ],
)
def test_an_object_that_says_more_in_another_place_stays_open(text):
    assert "false" not in str(schema_of(text)).lower()


def test_a_structure_is_made_once():
    schema = {"type": "object", "properties": {"made": {"const": "once"}}}
    assert structure_of("json_schema", schema) is structure_of("json_schema", dict(schema))


def test_a_job_has_one_structure():
    with pytest.raises(UsageError, match="json_schema and choice exclude each other; drop one"):
        Spec(inputs=("a.jsonl",), out="b.jsonl", json_schema="{}", choice=("a",))
    with pytest.raises(UsageError, match=r"regex cannot be followed \(unclosed group\); repair it"):
        Spec(inputs=("a.jsonl",), out="b.jsonl", regex="(")
    with pytest.raises(UsageError, match="min_tokens is 3, expected 0 beside a choice"):
        Spec(inputs=("a.jsonl",), out="b.jsonl", choice=("a",), min_tokens=3)


SUITE = json.loads((Path(__file__).parents[1] / "golden" / "json_schema_suite.json").read_text())


def said(matcher, chance):
    """Let a matcher over bytes write an answer; None: it does not come to an end."""
    answer = bytearray()
    while len(answer) < 200:
        bits = matcher.compute_bitmask()
        may = [byte for byte in range(256) if bits[byte // 8] >> byte % 8 & 1]
        if not may or (matcher.is_accepting() and chance.random() < 0.3):
            return answer.decode()
        closing = [byte for byte in may if byte in b'"}]']
        answer.append(chance.choice(closing if closing and chance.random() < 0.4 else may))
        matcher.consume_token(answer[-1])
    return None


def accepts(matcher, value):
    text = list(json.dumps(value).encode())
    return matcher.consume_tokens(text) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "may_come"),
    [
        ('{"a":1}', True),
        ('{\n  "a": 1\n}', True),
        ('{"a": 1}\n', True),
        ('{"a": 1}\n\n', False),
        ('{"a": 1} ', False),
        ('\n{"a": 1}', False),
        ('{  "a": 1}', False),
    ],
)
def test_json_has_few_blanks_and_may_end_with_a_line_break(text, may_come):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = structure_of("json_schema", schema).grammar
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    comes = matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
    assert comes is may_come


def test_the_json_schema_test_suite():
    """Each of its schemas is refused by name, or allows only what is valid."""
    refused, answers, byte_by_byte = [], 0, LLTokenizer("byte")
    for name, schema, wrong in SUITE["groups"]:
        try:
            grammar = structure_of("json_schema", schema).grammar
        except ValueError as error:
            refused.append(str(error))
            continue
        fresh = LLMatcher(byte_by_byte, grammar, log_level=0)
        assert not [each for each in wrong if accepts(fresh.deep_copy(), each)], name
        judge = Draft202012Validator(schema)
        for seed in range(3):
            text = said(fresh.deep_copy(), random.Random(seed))
            assert text is None or judge.is_valid(json.loads(text)), (name, text)
            answers += text is not None
    assert (len(SUITE["groups"]) - len(refused), answers >= 480) == (166, True)
    named = "has (the )?`|allows no answer|without an end|'m[a-z]+[A-Z][a-zA-Z]+'|patternProperty"
    assert [each for each in refused if not re.search(named, each)] == []
