"""A record keeps its name and its columns, whatever is wrong with it and however odd they are."""

import json

import pyarrow.parquet as pq
import pytest
from small_jobs import rows_in, start, write_lines

from dspark_batch.errors import UsageError
from dspark_batch.output.export import export, export_inputs
from dspark_batch.output.shown import first_rows
from dspark_batch.report import write_report

WEI = 2**256 - 1
LINES = [
    b'{"custom_id": "tx-77", "prompt": "a", "wei": %d}' % WEI,
    b'{"custom_id": "0", "prompt": "b"}',
    b'{"custom_id": "nan-5", "prompt": "c", "score": NaN, "low": [-Infinity]}',
    b'{"custom_id": "surr-6", "prompt": "d \\ud83d"}',
    b'{"custom_id": "half-7", "prompt": "\xc3\xa9", "tag": "x \\ud83d \xc3\xa9"}',
]
NAMES = ["tx-77", "0", "nan-5", "surr-6", "half-7"]


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_what_is_only_passed_through_refuses_no_record(tmp_path, out):
    write_lines(tmp_path / "in.jsonl", *LINES)
    report = start(tmp_path, out=f"{tmp_path}/{out}")
    assert (report.succeeded, report.errored) == (4, 1)
    rows = rows_in(tmp_path / out)
    assert [row["custom_id"] for row in rows] == NAMES
    assert rows[3]["error"]["message"].endswith(
        "in.jsonl:4: the prompt has half of a surrogate pair, which is no text; repair it."
    )
    assert [row["input_notes"] for row in rows] == [
        ["`wei` holds an integer beyond 64 bits"],
        None,
        ["`score` holds NaN or Infinity", "`low` holds NaN or Infinity"],
        ["`prompt` holds half a surrogate pair"],
        ["`tag` holds half a surrogate pair"],
    ]
    assert len(first_rows(f"{tmp_path}/{out}", 9)) == 5
    assert write_report(f"{tmp_path}/{out}", "tag").exists()


def test_what_is_odd_comes_out_of_json_lines_as_it_came_in(tmp_path):
    write_lines(tmp_path / "in.jsonl", *LINES)
    start(tmp_path)
    export(f"{tmp_path}/out.jsonl", f"{tmp_path}/copy.jsonl")
    for name in ("out.jsonl", "copy.jsonl"):
        raw = (tmp_path / name).read_text().splitlines()
        assert f'"wei":{WEI},' in raw[0]
        assert '"score":NaN,"low":[-Infinity],' in raw[2]
        assert '"prompt":"d \\ud83d",' in raw[3]
        assert json.loads(raw[4])["tag"] == "x \ud83d é"


def test_parquet_has_json_text_where_arrow_has_no_type(tmp_path):
    write_lines(tmp_path / "in.jsonl", *LINES)
    start(tmp_path, out=f"{tmp_path}/out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["wei"].to_pylist() == [str(WEI), None, None, None, None]
    assert str(table["score"].to_pylist()[2]) == "nan"
    assert json.loads(table["tag"].to_pylist()[4]) == "x \ud83d é"
    assert json.loads(table["prompt"].to_pylist()[3]) == "d \ud83d"


@pytest.mark.parametrize("digits", [b"1e999", b"-1e999", b"1" * 5000])
def test_a_number_that_nothing_can_hold_is_kept_as_its_digits(tmp_path, digits):
    write_lines(tmp_path / "in.jsonl", b'{"id": "a", "prompt": "x", "n": %s}' % digits)
    assert start(tmp_path).succeeded == 1
    [row] = rows_in(tmp_path / "out.jsonl")
    assert row["n"] == digits.decode()
    assert row["input_notes"] == [
        "`n` holds a number too large to compute with, which is kept as text"
    ]


@pytest.mark.parametrize(
    ("line", "name", "columns"),
    [
        (b'{"custom_id": "a", "n": 1, "prompt": "x', "a", {"n": 1}),
        (b'{"custom_id": "a", "n": 12', "a", {}),
        (b'{"custom_id": 12', "#0", {}),
        (b'{"custom_id": "a", "prompt": "x",}', "a", {"prompt": "x"}),
        (b'{"custom_id": "a", "prompt": "\xff", "m": [2]}', "a", {"m": [2]}),
        (b'{"custom_id": "\xff", "m": 2}', "#0", {"m": 2}),
        (b'{"custom_id": "a", "prompt": "x\x00", "m": 2}', "a", {"prompt": "x\x00", "m": 2}),
        (b'{"id": 7.0, "prompt": "x", "n": 0123}', "7", {"id": 7.0, "prompt": "x"}),
        (b'{"id": "a", "n": ' + b"[" * 5000, "a", {"id": "a"}),
        (b'{"id": "a", "n": ' + b"[" * 2000 + b"]" * 2000 + b"}", "a", {"id": "a"}),
        (b'{"id": "a", "\\ud83d": 1, "m": 2}', "a", {"id": "a", "m": 2}),
        (b'{"id": "a"} {"id": "b"}', "a", {"id": "a"}),
        (b"[1]", "#0", {}),
        (b'{"custom_id": [1], "m": 2}', "#0", {"m": 2}),
    ],
)
@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_a_failure_keeps_what_could_be_read(tmp_path, line, name, columns, out):
    write_lines(tmp_path / "in.jsonl", line, {"custom_id": "good", "prompt": "x"})
    report = start(tmp_path, out=f"{tmp_path}/{out}")
    assert (report.succeeded, report.errored) == (1, 1)
    row = rows_in(tmp_path / out)[0]
    assert row["custom_id"] == name
    for column, value in columns.items():
        assert row[column] == value


def test_a_float_is_the_name_of_the_integer_it_was_and_a_position_is_nobodys_name(tmp_path):
    write_lines(
        tmp_path / "in.jsonl",
        *({"id": id, "prompt": f"p{id}"} for id in (1.0, 2.0, None, "2")),
    )
    start(tmp_path)
    assert [row["custom_id"] for row in rows_in(tmp_path / "out.jsonl")] == ["1", "2", "#2", "2"]


def test_an_option_names_the_column_of_names(tmp_path):
    records = [{"uuid": "u1", "id": 1, "prompt": "a"}, {"uuid": 2.0, "id": 2, "prompt": "b"}]
    write_lines(
        tmp_path / "in.jsonl", *records, {"id": 3, "prompt": "c"}, {"uuid": [], "prompt": "d"}
    )
    start(tmp_path, id_column="uuid")
    rows = rows_in(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in rows] == ["u1", "2", "#2", "#3"]
    assert "`uuid` is [], expected a string or a number" in rows[3]["error"]["message"]


def test_an_option_for_names_loses_no_custom_id(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"uuid": "u1", "custom_id": "c", "prompt": "a"})
    with pytest.raises(UsageError, match="has a column `custom_id`, which is one of ours"):
        start(tmp_path, id_column="uuid")
    start(tmp_path, id_column="uuid", drop=("custom_id",))
    assert rows_in(tmp_path / "out.jsonl")[0]["custom_id"] == "u1"


def test_a_column_of_names_that_no_record_has_is_refused(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"uuid": "u1", "prompt": "a"})
    with pytest.raises(UsageError, match="--id-column names a column `uid` that no record"):
        start(tmp_path, id_column="uid")


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "a", "body": {"messages": [], "x\\ud83d": 1}}',
        b'{"id": "a", "messages": [{"role": "\\ud83d", "content": "x"}]}',
        b'{"id": "a", "messages": [{"role": "user", "content": [{"type": "\\ud83d"}]}]}',
        b'{"id": "a", "prompt": "x", "sampling_params": {"\\ud83d": 1}}',
        b'{"id": "a", "url": "\\ud83d", "body": {}}',
        b'{"id": "a", "messages": [{"role": "user", "content": "x", "name": "\\ud83d"}]}',
    ],
)
def test_half_a_pair_in_a_field_fails_its_record_only(tmp_path, line):
    write_lines(tmp_path / "in.jsonl", line, {"prompt": "x"})
    report = start(tmp_path)
    assert (report.succeeded, report.errored) == (1, 1)
    assert rows_in(tmp_path / "out.jsonl")[0]["error"]["message"].isprintable()


def test_a_line_that_could_not_be_read_whole_is_no_input_again(tmp_path):
    write_lines(
        tmp_path / "in.jsonl", b'{"id": "a", "n": 1, "prompt": "x', {"id": "b", "prompt": 5}
    )
    start(tmp_path)
    assert export_inputs(f"{tmp_path}/out.jsonl", f"{tmp_path}/again.jsonl") == 1
    assert rows_in(tmp_path / "again.jsonl") == [{"id": "b", "prompt": 5}]
