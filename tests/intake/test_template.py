"""A template writes what the record says, and nothing of Python."""

import pytest

from dspark_batch.intake.messages import Unusable
from dspark_batch.intake.template import prompt_of

ORDER = {"items": ["pen", "ink"], "values": 3, "note": "<b>it's & naïve</b>"}
PLAIN = '{"items": ["pen", "ink"], "values": 3, "note": "<b>it\'s & naïve</b>"}'
RECORD = {
    "order": ORDER,
    "words": ["a", "b"],
    "yes": True,
    "null": None,
    "n": 10**30,
    "x": 1.5,
}


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ order.items }}", '["pen", "ink"]'),
        ("{{ order.values }}", "3"),
        ('{{ order["items"][0] }} {{ order.items.1 }}', "pen ink"),
        ("{{ order }}", PLAIN),
        ("{{ row.order }}", PLAIN),
        ("{{ order | tojson }}", PLAIN),
        (
            '{{ order | tojson(separators=(",", ":")) }}',
            PLAIN.replace(": ", ":").replace(", ", ","),
        ),
        ("{{ order.items | tojson(indent=1) }}", '[\n "pen",\n "ink"\n]'),
        ("{{ {'b': 1, 'a': 2} | tojson }}", '{"b": 1, "a": 2}'),
        ("{{ 'Order: ' ~ order }}", f"Order: {PLAIN}"),
        ("{{ order | string }}", PLAIN),
        ("{{ [order, 1, true] | join(';') }}", f"{PLAIN};1;true"),
        ("{{ '%s' | format(order) }}", PLAIN),
        ("{{ order | upper }}", PLAIN.upper()),
        ("{{ words | map('upper') | list }}", '["A", "B"]'),
        ("{{ [order] | join(', ', attribute='values') }}", "3"),
        ("{{ order | pprint }}", PLAIN),
        (
            "{% if null is none and not null %}{{ null == none }}{% endif %}",
            "true",
        ),
        ("{{ null | default('x', true) }}", "x"),
        ("{{ [null, none] | tojson }}", "[null, null]"),
        ("{{ {'a': null} }}", '{"a": null}'),
        ("{{ yes }} {{ n }} {{ x }}", f"true {10**30} 1.5"),
        ("{{ words.index('b') }}{{ order.note.upper() }}", "1<B>IT'S & NAÏVE</B>"),
        ("{% for k, v in row.words | batch(2) %}{{ k }}={{ v }}{% endfor %}", "a=b"),
    ],
)
def test_a_template_writes_json(template, prompt):
    assert prompt_of(template, RECORD) == prompt


def test_a_method_can_be_called_where_no_item_has_its_name():
    template = "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}"
    assert prompt_of(template, {"d": {"a": 1, "b": [2]}}) == "a=1;b=[2];"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ d.items }}", "writes out the method `items`"),
        ("{{ words.count }}", "writes out the method `count`"),
        ("{{ 'x' ~ d.keys }}", "writes out the method `keys`"),
        ("{{ d.items | string }}", "writes out the method `items`"),
        ("{{ d.items | upper }}", "writes out the method `items`"),
        ("{{ [d.items] | join }}", "writes out the method `items`"),
        ("{{ '%s' | format(d.items) }}", "writes out the method `items`"),
        ("{{ d.items | tojson }}", "a _Method is not JSON"),
        ("{{ d.items() }}", "writes out a dict_items"),
        ("{{ words | map('upper') }}", "writes out a generator"),
        ("{{ range }}", "writes out a "),
        ("{{ 'x' ~ none }}", "writes out a null"),
        ("{{ 'x' ~ nothing }}", "writes out a null"),
        ("{{ nothing | trim }}", "writes out a null"),
        ("{{ nothing | upper }}", "writes out a null"),
        ("{{ '%s' % nothing }}", "writes out a null"),
        ("{{ '%s' | format(nothing) }}", "writes out a null"),
        ("{{ 'x{}'.format(nothing) }}", "writes out a null"),
        ("{{ nothing | default('x') }}", "writes out a null"),
        ("{{ [1, nothing] | join }}", "writes out a null"),
        ("{{ nan }}", "writes out nan, which is no number"),
        ("{{ [nan] | tojson }}", "not JSON compliant"),
    ],
)
def test_a_template_writes_nothing_else(template, reason):
    record = {"d": {"a": 1}, "words": ["a"], "nothing": None, "nan": float("nan")}
    with pytest.raises(Unusable, match=reason):
        prompt_of(template, record)


@pytest.mark.parametrize(
    "template", ["{{ row }}", "{{ row | tojson }}", "{% for x in row %}a{% endfor %}"]
)
def test_a_column_with_the_name_of_all_columns_is_never_taken_for_them(template):
    assert prompt_of(template, {"x": "a"})
    with pytest.raises(
        Unusable, match=r"one of them is called `row`; write `row.row` for that one"
    ):
        prompt_of(template, {"x": "a", "row": "b"})
    said = prompt_of("{{ row.row }} {{ row['row'] }} {{ row['x'] }}", {"x": "a", "row": "b"})
    assert said == "b b a"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ order.missing }}", "(an object has no attribute 'missing')"),
        ("{{ order.items() }}", "(a list is not callable)"),
        ("{{ order.update }}", "(access to attribute 'update' of an object is unsafe.)"),
        ("{{ [order.missing] }}", "(a field that is not there is not JSON)"),
    ],
)
def test_a_complaint_speaks_of_json(template, reason):
    with pytest.raises(Unusable) as complaint:
        prompt_of(template, RECORD)
    assert reason in str(complaint.value)
