import datetime
import decimal
import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import write_lines

from dspark_batch.errors import UsageError
from dspark_batch.intake.reader import (
    Source,
    count_records,
    digest_of,
    locate,
    read,
    read_chunks,
    spool,
)
from dspark_batch.types import Item


def read_bytes(tmp_path, content: bytes):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    return list(read([Source("in.jsonl", path)]))


def read_table(tmp_path, table, **options):
    pq.write_table(table, tmp_path / "in.parquet", **options)
    return list(read([Source("in.parquet", tmp_path / "in.parquet")]))


def test_a_record_becomes_an_item_that_knows_where_it_comes_from(tmp_path):
    line = b'{"prompt":"hi","n":1}'
    (item,) = read_bytes(tmp_path, line + b"\n")
    assert item == Item(0, "#0", digest_of(line), "in.jsonl:1", {"prompt": "hi", "n": 1})


def test_the_last_line_needs_no_newline(tmp_path):
    assert len(read_bytes(tmp_path, b'{"a":1}\n{"a":2}')) == 2


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path):
    items = read_bytes(tmp_path, b'\n{"a":1}\n \t\r\n\n{"a":2}\n')
    assert [(item.index, item.where) for item in items] == [(0, "in.jsonl:2"), (1, "in.jsonl:5")]


def test_a_byte_order_mark_and_carriage_returns_change_nothing(tmp_path):
    plain = read_bytes(tmp_path, b'{"a":1}\n{"a":2}\n')
    assert read_bytes(tmp_path, b'\xef\xbb\xbf{"a":1}\r\n{"a":2}\r\n') == plain


@pytest.mark.parametrize("inside", ["\u2028", "\u0085", "\x7f"])
def test_only_a_newline_ends_a_line(tmp_path, inside):
    (item,) = read_bytes(tmp_path, f'{{"a":"x{inside}y",\r"b":2}}\n'.encode())
    assert item.record == {"a": f"x{inside}y", "b": 2}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a":1', "unexpected end of data"),
        (b'{"a":"\xc3"}', "not valid UTF-8"),
        (b'{"a":"\0"}', "control character"),
        (b'{"a":"x\ry"}', "control character"),  # and the line goes on behind it
        (b"{} {}", "unexpected content after document"),
        (b"\0\0\0", "unexpected character"),
        (b"[" * 5000, "depth limit exceeded"),
    ],
)
def test_a_line_that_is_not_json_is_a_failure_with_its_reason(tmp_path, line, reason):
    good, bad, after = read_bytes(tmp_path, b'{"a":1}\n' + line + b'\n{"a":2}\n')
    assert (good.index, bad.item.index, after.index) == (0, 1, 2)
    assert (bad.item.custom_id, bad.item.digest, bad.code) == ("#1", digest_of(line), "bad_record")
    assert bad.message.startswith("in.jsonl:2: not JSON (")
    assert reason in bad.message


@pytest.mark.parametrize(
    ("line", "key", "left"),
    [
        (b'{"id":"x","prompt":"a","prompt":"b"}', "prompt", {"id": "x"}),
        (b'{"id":"x","prompt" :"a","prompt"\t:"a"}', "prompt", {"id": "x"}),
        (b'{"id":"x","id":"y","n":1}', "id", {"n": 1}),
        (b'{"id":"x","n":1,"\\u006e":NaN}', "n", {"id": "x"}),
        (b'{"id":"x","m":[{"role":"user","content":"a","content":"b"}]}', "content", None),
        (b'{"body":{"messages":[{"role":"user","role":"user"}]}}', "role", None),
    ],
)
def test_a_key_twice_in_one_object_is_refused(tmp_path, line, key, left):
    (failure,) = read_bytes(tmp_path, line)
    said = f"the key `{key}` stands twice in one object; keep one of them."
    assert failure.message == f"in.jsonl:1: {said}"
    assert failure.item.record == (json.loads(line) if left is None else left)
    assert failure.item.custom_id == ("x" if b'"x"' in line and key != "id" else "#0")


def test_text_that_looks_like_keys_is_no_key(tmp_path):
    record = {"a": '"b": 1, "b": 2', "b": {"a": ["\\", {"a": 1}, {"a": 2}]}, "c": '{"a":1,"a":2}'}
    assert read_bytes(tmp_path, json.dumps(record).encode())[0].record == record


@pytest.mark.parametrize(
    ("line", "kind"),
    [(b"[1]", "a list"), (b'"x"', "a string"), (b"7", "a number"), (b"null", "null")],
)
def test_a_line_that_is_not_an_object_is_a_failure(tmp_path, line, kind):
    (_, failure) = read_bytes(tmp_path, b"{}\n" + line)
    assert failure.message.endswith(f"found {kind}.")


@pytest.mark.parametrize(
    ("line", "custom_id"),
    [
        (b'{"custom_id":"x","id":"y"}', "x"),
        (b'{"id":"y"}', "y"),
        (b'{"id":7}', "7"),
        (b'{"custom_id":null,"id":"y"}', "y"),
        (b'{"id":null}', "#0"),
        (b'{"id":1.0}', "1"),
        (b'{"id":NaN}', "#0"),
        (b'{"custom_id":1.5}', "1.5"),
        (b'{"custom_id":NaN,"id":7}', "7"),
        (b'{"id":1e300}', str(int(1e300))),
        (b'{"id":%d}' % 10**40, str(10**40)),
        (b'{"id":"\\ud83d"}', "#0"),
        (b'{"id":[1]}', "#0"),
        (b'{"custom_id":""}', "#0"),
        (b'{"custom_id":" ","id":"y"}', "y"),
        (b"{}", "#0"),
    ],
)
def test_the_name_is_custom_id_else_id_else_the_position(tmp_path, line, custom_id):
    (item,) = read_bytes(tmp_path, line)
    assert item.custom_id == custom_id


@pytest.mark.parametrize("value", [b"true", b"[]", b"{}", b'"\\ud83d"'])
def test_a_custom_id_that_is_no_name_is_a_failure(tmp_path, value):
    (failure,) = read_bytes(tmp_path, b'{"custom_id":' + value + b"}")
    assert "`custom_id` is" in failure.message


@pytest.mark.parametrize(
    "pack", [gzip.compress, lambda raw: pa.compress(raw, "zstd", asbytes=True)]
)
def test_compressed_files_read_like_plain_ones_even_in_several_members(tmp_path, pack):
    plain = read_bytes(tmp_path, b'{"a":1}\n{"a":2}\n')
    suffix = "gz" if pack is gzip.compress else "zst"
    (tmp_path / f"p.jsonl.{suffix}").write_bytes(pack(b'{"a":1}\n{"a"') + pack(b":2}\n"))
    source = Source("in.jsonl", tmp_path / f"p.jsonl.{suffix}")
    assert list(read([source])) == plain
    assert count_records(source) == 2


def test_several_files_are_one_job(tmp_path):
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", {"from": name}, {"from": name})
    sources = locate([f"{tmp_path}/[ab].jsonl", f"{tmp_path}/a.jsonl"], tmp_path / "stdin")
    items = list(read(sources))
    assert [item.index for item in items] == list(range(6))
    assert [item.record["from"] for item in items] == ["a", "a", "b", "b", "a", "a"]
    assert [item.where for item in items][2] == f"{tmp_path}/b.jsonl:1"


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    path = write_lines(tmp_path / "in[1].jsonl", {"a": 1})
    assert locate([str(path)], tmp_path / "stdin") == (Source(str(path), path),)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_a_limit_takes_the_first_records(tmp_path, limit):
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", {"n": 1}, {"n": 2})
    sources = locate([f"{tmp_path}/*.jsonl"], tmp_path / "stdin")
    assert list(read(sources, range(limit))) == list(read(sources))[:limit]


def test_a_limit_takes_the_first_rows_of_parquet(tmp_path):
    pq.write_table(pa.table({"n": [1, 2, 3]}), tmp_path / "in.parquet")
    (chunk,) = read_chunks([Source("in.parquet", tmp_path / "in.parquet")], range(2))
    assert (len(chunk.records), chunk.batch.num_rows) == (2, 2)


def test_standard_input_is_spooled_whole(tmp_path):
    spool(io.BytesIO(b'{"a":1}\n{"a":2}'), tmp_path / "stdin.jsonl")
    items = list(read(locate(["-"], tmp_path / "stdin.jsonl")))
    assert [item.where for item in items] == ["<stdin>:1", "<stdin>:2"]


def test_a_parquet_row_reads_like_the_json_line_that_says_the_same(tmp_path):
    (item,) = read_table(tmp_path, pa.table({"prompt": ["hi"], "id": [7], "x": [None]}))
    assert item.record == {"prompt": "hi", "id": 7, "x": None}
    assert (item.custom_id, item.where) == ("7", "in.parquet:1")
    assert item.digest == digest_of(b'{"prompt":"hi","id":7,"x":null}')


def test_row_groups_are_read_as_one_file(tmp_path):
    table = pa.table({"n": list(range(2500))})
    items = read_table(tmp_path, table, row_group_size=700)
    assert [item.record["n"] for item in items] == list(range(2500))
    assert [item.index for item in items] == list(range(2500))
    assert items[-1].where == "in.parquet:2500"


def test_every_arrow_type_can_be_said_in_json(tmp_path):
    nanosecond = pa.timestamp("ns", "UTC")
    table = pa.table(
        {
            "nested": pa.array([[{"at": 1, "n": None}]], pa.list_(pa.struct({"at": nanosecond}))),
            "time": pa.array([1], pa.time64("ns")),
            "span": pa.array([5], pa.duration("ns")),
            "day": [datetime.date(2020, 2, 1)],
            "price": [decimal.Decimal("1.50")],
            "raw": [b"\xff\x00"],
            "word": pa.array(["w"]).dictionary_encode(),
            "large": pa.array(["l"], pa.large_string()),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "half": pa.array([0.5], pa.float16()),
            "nan": [float("nan")],
            "big": pa.array([2**64 - 1], pa.uint64()),
        }
    )
    (item,) = read_table(tmp_path, table)
    assert item.record == {
        "nested": [{"at": "1970-01-01 00:00:00.000000001Z"}],
        "time": "00:00:00.000000001",
        "span": "5",
        "day": "2020-02-01",
        "price": "1.50",
        "raw": "/wA=",
        "word": "w",
        "large": "l",
        "map": [["k", 1]],
        "half": 0.5,
        "nan": None,
        "big": 2**64 - 1,
    }


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", *({"prompt": "x" * 400} for _ in range(16_000)))
    source = Source("in.jsonl", path)
    tracemalloc.start()
    count = sum(1 for _ in read([source]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 16_000
    assert peak < path.stat().st_size / 2


def test_a_file_that_vanishes_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"in.jsonl: cannot be read to its end"):
        list(read([Source("in.jsonl", tmp_path / "gone.jsonl")]))
