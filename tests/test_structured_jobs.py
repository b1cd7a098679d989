"""Jobs whose answers must look like something: from a file to typed rows, resumed and audited."""

import json

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import rows_in, write_lines

from benchmarks.structured import SCHEMAS
from dspark_batch.answers import steering
from dspark_batch.errors import Resumable
from dspark_batch.models.grammar import Guide
from dspark_batch.opening import open_with
from dspark_batch.pair import load_pair
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec
from dspark_batch.verify import verify

SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["good", "bad"]},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
        "score": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["label", "score"],
}


def of_schema(schema, **more):
    shape = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    return {"sampling_params": {"response_format": shape, **more}}


def records_of(schemas):
    return [
        {"id": f"{n}", "prompt": f'Spell "cat{n}" backwards.', **of_schema(schema)}
        for n, schema in enumerate(schemas)
    ]


SHORT = [SCHEMAS[n] for n in (1, 5, 6, 9, 12, 13, 14, 18)]  # of which answers soon end
RECORDS = records_of(SCHEMAS[::2])


@pytest.fixture(scope="module")
def open_engine():
    """Open the bundled pair once for each kind of job."""
    pair, kept = load_pair("tiny", dtype="float32"), {}

    def open_engine(spec, manifest):
        kind = (spec.draft_length, spec.slots)
        if kind not in kept:
            kept[kind] = open_with(pair, spec)
        return kept[kind]

    return open_engine


@pytest.fixture
def start(open_engine, tmp_path):
    """Make what runs records into a file and returns the rows."""

    def start(name, records=RECORDS, stop=lambda: False, **options):
        source, out = write_lines(tmp_path / "in.jsonl", *records), tmp_path / name
        # A fixed draft length: the pace might find that drafts do not pay on a busy machine.
        options = {"max_tokens": 200, "slots": 4, "draft_length": 7} | options
        spec = Spec(inputs=(str(source),), out=str(out), **options)
        run(spec, open_engine=open_engine, stop=stop)
        return rows_in(out)

    return start


def without_metrics(rows):
    return [{k: v for k, v in row.items() if k != "metrics"} for row in rows]


@pytest.mark.parametrize(
    ("temperature", "schemas"),
    [
        (0.0, SHORT[::2]),
        (1.0, SHORT[1::2]),
        pytest.param(0.0, SCHEMAS, marks=pytest.mark.slow),
        pytest.param(1.0, SCHEMAS, marks=pytest.mark.slow),
    ],
    ids=["greedy", "sampled", "all, greedy", "all, sampled"],
)
def test_every_answer_validates_with_and_without_drafts(temperature, schemas, start):
    rows = start("a.jsonl", records_of(schemas), temperature=temperature)
    for row, schema in zip(rows, schemas, strict=True):
        assert row["structure"] == {"kind": "json_schema", "parsed": True}, row["completion"]
        jsonschema.validate(json.loads(row["completion"]), schema)
    plain = start("b.jsonl", records_of(schemas), temperature=temperature, draft_length=0)
    assert without_metrics(plain) == without_metrics(rows)


def test_a_job_that_was_stopped_goes_on_to_the_same_rows(start, tmp_path):
    job = {"records": records_of(SCHEMAS[1::7]), "temperature": 1.0, "slots": 2}
    whole = start("whole.jsonl", **job)
    asked = iter([False])
    with pytest.raises(Resumable):
        start("out.jsonl", **job, stop=lambda: next(asked, True))
    num_rows = len((tmp_path / "out.jsonl.run" / "rows.jsonl").read_bytes().splitlines())
    assert 0 < num_rows < len(job["records"])
    assert without_metrics(start("out.jsonl", **job)) == without_metrics(whole)


def test_a_schema_of_the_job_makes_a_typed_column(start, tmp_path):
    records = [
        {"id": "0", "prompt": "Rate it."},
        {"id": "1", "prompt": "Rate it.", "sampling_params": {"max_tokens": 3}},
        {"id": "2", "prompt": 5},
    ]
    start("o.parquet", records, json_schema=json.dumps(SCHEMA))
    table = pq.read_table(tmp_path / "o.parquet")
    texts = pa.list_(pa.field("element", pa.string()))
    fields = {"label": pa.string(), "notes": texts, "score": pa.int64()}
    assert table.schema.field("parsed").type == pa.struct(fields)
    whole, cut, failed = table.to_pylist()
    assert {k: v for k, v in whole["parsed"].items() if v is not None} == json.loads(
        whole["completion"]
    )
    assert (cut["parsed"], cut["finish_reason"], cut["structure"]["parsed"]) == (
        None,
        "length",
        False,
    )
    assert (failed["parsed"], failed["structure"]) == (None, None)
    lines = start("o.jsonl", records, json_schema=json.dumps(SCHEMA))
    assert [line["parsed"] for line in lines] == [json.loads(lines[0]["completion"]), None, None]


def test_a_value_that_its_type_cannot_hold_makes_the_column_text(start):
    own = of_schema({"type": "array", "items": {"const": 7}, "minItems": 2, "maxItems": 2})
    records = [{"id": "0", "prompt": "Rate it."}, {"id": "1", "prompt": "Rate it.", **own}]
    rows = start("o.parquet", records, json_schema=json.dumps(SCHEMA))
    assert [json.loads(row["parsed"]) for row in rows] == [
        json.loads(row["completion"]) for row in rows
    ]


def test_one_bad_schema_fails_its_item_only(start):
    bad = [{"uniqueItems": True}, {"$ref": "https://a.example/b"}, {"$ref": "#"}, False]
    good = RECORDS[:2]
    more = [{"id": f"bad{n}", "prompt": "a", **of_schema(s)} for n, s in enumerate(bad)]
    rows = start("o.jsonl", [*good, *more])
    assert [row["status"] for row in rows] == ["succeeded"] * 2 + ["errored"] * 4
    assert [row["error"]["code"] for row in rows[2:]] == ["bad_record"] * 4
    assert "has `uniqueItems`, which is not supported" in rows[2]["error"]["message"]


def test_lines_of_the_openai_format_have_structured_answers(start):
    body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 60}
    shape = of_schema(SCHEMAS[1])["sampling_params"]["response_format"]
    record = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    (line,) = start(
        "o.jsonl", [record | {"body": body | {"response_format": shape}}], format="openai"
    )
    said = line["response"]["body"]["choices"][0]["message"]["content"]
    jsonschema.validate(json.loads(said), SCHEMAS[1])


def not_taken_back(patch):
    patch.setattr(Guide, "_take_back", lambda self: self._before.clear())


def one_position_late(patch):
    """Hold each mask for one position more; where both leave nothing, the matcher would object."""
    real = steering._Allowed._ask

    def late(self, *asked):
        real(self, *asked)
        if len(self._rows) > 1:
            both = self._rows[-2] & self._rows[-1]
            is_left = both.any(axis=1)
            self._rows[-1][is_left] = both[is_left]

    patch.setattr(steering._Allowed, "_ask", late)


@pytest.mark.parametrize("mistake", [None, not_taken_back, one_position_late])
def test_verify_sees_a_grammar_that_was_followed_wrongly(
    mistake, start, open_engine, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        if mistake:
            mistake(patch)
        start("o.jsonl", RECORDS[:4])
    audit = verify(str(tmp_path / "o.jsonl"), sample=None, open_engine=open_engine)
    assert (audit.verdict == "equal") is (mistake is None)
    assert bool(audit.differences) is (mistake is not None)
    assert mistake or audit.replayed == 4
