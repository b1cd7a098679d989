"""What the output looks like, JSONL and Parquet."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FakeEngine, refuse_to_open
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.record.rows import ROW_SCHEMA


def parquet_of(folder, *records, **options):
    """Run JSON records into a Parquet output."""
    write_lines(folder / "in.jsonl", *records)
    start(folder, out=f"{folder}/out.parquet", fsync_every=9999, **options)
    return pq.read_table(folder / "out.parquet")


def column_of(folder, *values):
    table = parquet_of(folder, *({"prompt": "p", "x": value} for value in values))
    return table.schema.field("x").type, table["x"].to_pylist()


def test_rows_come_in_input_order_with_the_input_columns_first(tmp_path):
    write_lines(
        tmp_path / "in.jsonl", *({"n": n, "prompt": str(n), "x": {"y": [n]}} for n in range(9))
    )
    start(tmp_path, slots=4)
    rows = rows_in(tmp_path / "out.jsonl")
    assert [row["n"] for row in rows] == list(range(9))
    assert [*rows[0]] == ["n", "prompt", "x", *ROW_SCHEMA.names]
    assert rows[3]["x"] == {"y": [3]}


def test_each_row_answers_its_own_prompt(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c", "d"))
    start(tmp_path, slots=4)
    alone = {}
    for name in "abcd":
        write_lines(tmp_path / "in.jsonl", *prompts(name))
        start(tmp_path, out=f"{tmp_path}/{name}.jsonl")
        alone |= {
            row["custom_id"]: row["completion"] for row in rows_in(tmp_path / f"{name}.jsonl")
        }
    rows = rows_in(tmp_path / "out.jsonl")
    assert {row["custom_id"]: row["completion"] for row in rows} == alone
    assert len(set(alone.values())) == 4


def test_our_columns_have_one_type_from_the_first_row_on(tmp_path):
    for name, records in {
        "bad": [b"{nope"],
        "good": prompts("a"),
        "both": [b"x", *prompts("a")],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        schema = parquet_of(folder, *records).schema
        assert pa.schema([schema.field(name) for name in ROW_SCHEMA.names]).equals(ROW_SCHEMA)


def test_jsonl_and_parquet_say_the_same(tmp_path):
    records = [*prompts("a", "b"), b"nope", {"messages": [{"role": "user", "content": "c"}]}]
    table = parquet_of(tmp_path, *records)
    start(tmp_path)
    columns = dict.fromkeys(table.column_names)
    assert table.to_pylist() == [columns | row for row in rows_in(tmp_path / "out.jsonl")]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_same_rows_make_the_same_bytes(tmp_path, suffix):
    write_lines(tmp_path / "in.jsonl", *prompts(*"abcdefgh"), b"[]")
    start(tmp_path, out=f"{tmp_path}/one.{suffix}", slots=1)
    start(tmp_path, out=f"{tmp_path}/two.{suffix}", slots=5)
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_a_prefix_names_our_columns_and_keeps_all_of_theirs(tmp_path):
    record = {"prompt": "p", "status": "new", "custom_id": "x"}
    table = parquet_of(tmp_path, record, output_prefix="gen_")
    (row,) = table.to_pylist()
    assert {name: row[name] for name in record} == record
    assert (row["gen_status"], row["gen_custom_id"]) == ("succeeded", "x")
    start(tmp_path, output_prefix="gen_")
    assert rows_in(tmp_path / "out.jsonl") == [row]


def test_a_custom_id_column_appears_once(tmp_path):
    table = parquet_of(tmp_path, {"custom_id": 7, "prompt": "p"})
    assert table.column_names == ["prompt", *ROW_SCHEMA.names]
    assert table["custom_id"].to_pylist() == ["7"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((None, None, "a"), pa.string()),
        ((None, 1), pa.int64()),
        ((1, 2.5), pa.float64()),
        ((None, True), pa.bool_()),
        ((None, None), pa.string()),
        (([], None, ["a"]), pa.list_(pa.field("element", pa.string()))),
        (({"a": 1}, {"a": None}), pa.struct({"a": pa.int64()})),
    ],
)
def test_a_json_column_gets_the_type_that_fits_all_its_values(tmp_path, values, kind):
    assert column_of(tmp_path, *values) == (kind, [*values])


@pytest.mark.parametrize(
    "values",
    [
        (1, "a"),
        (True, 1),
        ({"a": 1}, [1]),
        ({"a": 1}, {"a": "b"}),
        ({}, {}),
        ([{}],),
        (2**63, 1),
        (2**53 + 1, 0.5),
    ],
)
def test_a_column_that_no_type_fits_becomes_json_text(tmp_path, values):
    kind, texts = column_of(tmp_path, *values, None)
    assert kind == pa.string()
    assert texts.pop() is None
    assert tuple(json.loads(text) for text in texts) == values


def test_types_are_found_over_all_rows_not_over_the_first_thousand(tmp_path):
    first = [None] * 1001
    assert column_of(tmp_path, *first, "a") == (pa.string(), [*first, "a"])
    assert column_of(tmp_path, *first, 1)[0] == pa.int64()


def test_a_value_that_does_not_fit_what_its_neighbours_became_makes_json_text(tmp_path):
    values = [2**53 + 1, *[1] * 1000, 0.5]  # two chunks: int64 and double
    kind, texts = column_of(tmp_path, *values)
    assert kind == pa.string()
    assert [json.loads(text) for text in texts] == values


def test_a_parquet_input_keeps_its_types_and_values_to_the_last_bit(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["a", None, "c"], pa.large_string()),
            "at": pa.array([1, None, 3], pa.timestamp("ns", "UTC")),
            "price": pa.array([decimal.Decimal("1.50"), None, None], pa.decimal128(9, 2)),
            "raw": [b"\xff", b"", None],
            "word": pa.array(["x", "y", None]).dictionary_encode(),
            "day": [datetime.date(2020, 1, 1), None, None],
            "nested": pa.array(
                [[{"at": 1}], [], None], pa.list_(pa.struct({"at": pa.timestamp("ns")}))
            ),
            "small": pa.array([1, 2, None], pa.uint8()),
            "nan": [float("nan"), 1.0, None],
        }
    )
    pq.write_table(table.replace_schema_metadata({"huggingface": "{}"}), tmp_path / "in.parquet")
    inputs = (f"{tmp_path}/in.parquet",)
    start(tmp_path, inputs=inputs, out=f"{tmp_path}/out.parquet")
    written = pq.read_table(tmp_path / "out.parquet")
    again = pq.read_table(tmp_path / "in.parquet").replace_schema_metadata(None)
    kept = written.select(table.column_names)
    assert kept.schema.equals(again.schema)
    assert kept.drop_columns(["nan"]).equals(again.drop_columns(["nan"]))
    assert str(kept["nan"]) == str(again["nan"])
    assert written["status"].to_pylist() == ["succeeded", "errored", "succeeded"]


def test_a_parquet_input_can_be_written_as_jsonl(tmp_path):
    table = pa.table({"prompt": ["a"], "at": pa.array([1], pa.timestamp("ns")), "raw": [b"\xff"]})
    pq.write_table(table, tmp_path / "in.parquet")
    start(tmp_path, inputs=(f"{tmp_path}/in.parquet",))
    (row,) = rows_in(tmp_path / "out.jsonl")
    assert (row["at"], row["raw"]) == ("1970-01-01 00:00:00.000000001", "/w==")


def test_files_with_different_columns_and_formats_make_one_output(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"prompt": "a", "n": 1, "x": "text"})
    pq.write_table(pa.table({"prompt": ["b"], "n": [0.5], "x": [b"\xff"]}), tmp_path / "b.parquet")
    pq.write_table(
        pa.table({"prompt": ["c"], "n": [3], "y": [7], "x": [1]}), tmp_path / "c.parquet"
    )
    start(tmp_path, inputs=(f"{tmp_path}/[abc].*",), out=f"{tmp_path}/out.parquet")
    rows = rows_in(tmp_path / "out.parquet")
    assert [(row["prompt"], row["n"], row["y"]) for row in rows] == [
        *(("a", 1.0, None), ("b", 0.5, None), ("c", 3.0, 7))
    ]
    assert [row["x"] for row in rows] == ['"text"', '"/w=="', "1"]


def test_a_parquet_value_that_does_not_fit_the_other_files_type_makes_json_text(tmp_path):
    for name, values in {"a": [0.5], "b": [2**53 + 1]}.items():
        pq.write_table(pa.table({"prompt": ["p"], "x": values}), tmp_path / f"{name}.parquet")
    start(tmp_path, inputs=(f"{tmp_path}/[ab].parquet",), out=f"{tmp_path}/out.parquet")
    assert [row["x"] for row in rows_in(tmp_path / "out.parquet")] == ["0.5", "9007199254740993"]


def test_large_outputs_are_written_in_row_groups(tmp_path):
    parquet_of(tmp_path, *({"prompt": "p"} for _ in range(2001)))
    written = pq.ParquetFile(tmp_path / "out.parquet")
    assert (written.num_row_groups, written.metadata.num_rows) == (3, 2001)


def test_the_output_can_be_written_again_from_the_journal_alone(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts(*"abc"))
    start(tmp_path, engine=FakeEngine(slots=3))
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    start(tmp_path, opener=refuse_to_open)
    assert (tmp_path / "out.jsonl").read_bytes() == before
