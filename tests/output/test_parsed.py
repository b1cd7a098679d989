"""Answers to a schema as values, in a type made from the schema."""

import json

import pyarrow as pa
import pytest

from dspark_batch.output.parsed import column_of
from dspark_batch.record.rows import parsed_in

TEXT, NUMBER = pa.string(), pa.float64()


def column(schema):
    return column_of(json.dumps(schema))


def listed(kind):
    return pa.list_(pa.field("element", kind))


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, TEXT),
        ({"type": "integer"}, pa.int64()),
        ({"type": "number"}, NUMBER),
        ({"type": "boolean"}, pa.bool_()),
        ({"enum": ["a", "b", None]}, TEXT),
        ({"enum": [1, 2]}, pa.int64()),
        ({"enum": [1, 2.5]}, NUMBER),
        ({"const": True}, pa.bool_()),
        ({"type": ["string", "null"]}, TEXT),
        ({"type": ["integer", "number"]}, NUMBER),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, pa.int64()),
        ({"type": "array", "items": {"type": "integer"}}, listed(pa.int64())),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "number"}}}, NUMBER),
        (
            {"type": "object", "properties": {"a": {"type": "number"}, "b": {"enum": ["x"]}}},
            pa.struct({"a": NUMBER, "b": TEXT}),
        ),
    ],
)
def test_a_schema_has_an_arrow_type(schema, kind):
    assert column(schema).type == kind


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object"}, {"a": 1}),
        ({}, "a"),
        ({"enum": ["a", 1]}, "a"),
        ({"type": ["string", "integer"]}, 3),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, {"b": 1}),
        ({"type": "array", "prefixItems": [{"type": "string"}]}, ["a", 1]),
        ({"type": "array"}, [1, "a"]),
    ],
)
def test_what_has_none_is_json_text(schema, value):
    (text,) = column(schema).array([value]).to_pylist()
    assert json.loads(text) == value


def test_a_part_that_has_none_is_json_text_in_its_place():
    tree = {"type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#"}}}
    schema = {"type": "object", "properties": {"any": {}, "tree": tree, "list": {"items": {}}}}
    schema["properties"]["list"] |= {"type": "array"}
    value = {"any": "é", "list": [1, None, {}]}
    (said,) = column(schema).array([value]).to_pylist()
    assert said == {"any": '"é"', "tree": None, "list": ["1", None, "{}"]}


def test_an_object_inside_itself_is_json_text_there():
    tree = {"type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#"}}}
    values = [{"n": 1, "next": {"n": 2}}, None]
    assert column(tree).array(values).to_pylist() == [{"n": 1, "next": '{"n":2}'}, None]


@pytest.mark.parametrize("value", [{"a": "x"}, {"a": 10**30}, {"b": 1}, [1], "a"])
def test_a_value_that_does_not_fit_is_no_silent_null(value):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with pytest.raises((pa.ArrowException, ValueError, OverflowError, TypeError)):
        column(schema).array([value])


def test_only_a_whole_answer_to_a_schema_has_a_value():
    def row(kind, parsed, completion='{"a": 1}'):
        structure = kind and {"kind": kind, "parsed": parsed}
        return {"completion": completion, "structure": structure}

    assert parsed_in(row("json_schema", True)) == {"a": 1}
    assert parsed_in(row("json_schema", False)) is None
    assert parsed_in(row("regex", True)) is None
    assert parsed_in(row(None, None)) is None
    assert parsed_in(row("json_schema", True, "[1E999, 36893488147419103232]")) == [
        float("inf"),
        2.0**65,
    ]
