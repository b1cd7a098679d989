"""What a file is, its first bytes say: it is read, or refused in one sentence."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import refuse_to_open
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.errors import UsageError
from dspark_batch.intake.files import Source, count_records
from dspark_batch.intake.reader import item_of, read

RECORDS = [{"prompt": "a, b", "n": "1"}, {"prompt": 'say "hi"\nand [go], {x}', "n": "\u20ac \\"}]


def packed(raw):
    """Pack with gzip, to the same bytes at any time: tests are named by them."""
    return gzip.compress(raw, mtime=0)


def lines():
    return b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


def parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(RECORDS), sink)
    return sink.getvalue().to_pybytes()


def ipc(new):
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(RECORDS)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def zstd(raw):
    return pa.compress(raw, "zstd", asbytes=True)


ARRAY = json.dumps(RECORDS).encode()
PRETTY = json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()
OBJECTS = b"\n".join(json.dumps(record, indent=1).encode() for record in RECORDS)
CSV = 'prompt,n\n"a, b",1\r\n\n"say ""hi""\nand [go], {x}",€ \\'.encode()
TSV = CSV.replace(b'"a, b",', b"a, b\t").replace(b"prompt,n", b"prompt\tn").replace(b'",', b'"\t')
BOM = b"\xef\xbb\xbf"


def written(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return Source(name, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("in.jsonl", packed(lines())), ("in.jsonl.gz", lines())),
        *(("in.jsonl", zstd(lines())), ("in.json", lines()), ("in.parquet", lines())),
        *(("in.jsonl.bz2", bz2.compress(lines())), ("in.jsonl.xz", lzma.compress(lines()))),
        *(("in.jsonl", parquet()), ("part-0001", parquet()), ("in.jsonl.gz", parquet())),
        *(("in.arrow", ipc(pa.ipc.new_file)), ("in.jsonl", ipc(pa.ipc.new_stream))),
        *(("in.json", ARRAY), ("in.jsonl", ARRAY), ("in.jsonl", PRETTY), ("x", PRETTY + b"\n\n")),
        *(("in.json", BOM + PRETTY), ("in.json.gz", packed(b" \n" + ARRAY))),
        *(("in.json", OBJECTS), ("in.jsonl", OBJECTS), ("in.json", OBJECTS.replace(b"{\n", b"{"))),
        *(("in.csv", CSV), ("in.CSV", BOM + CSV), ("in.csv.gz", packed(CSV))),
        *(("in.tsv", TSV), ("in.tsv.zst", zstd(TSV)), ("no ending", lines())),
    ],
)
def test_the_same_records_come_out_of_every_kind_of_file(tmp_path, name, content):
    source = written(tmp_path, name, content)
    items = list(read([source]))
    assert [item.record for item in items] == RECORDS
    assert len({item.where for item in items}) == 2
    assert count_records(source) == 2


UTF_16 = "is text in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`."
UTF_32 = "is text in UTF-32; convert it with `iconv -f UTF-32 -t UTF-8`."
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
LFS_SAID = "is a Git LFS pointer, not the file; get it with `git lfs pull`."
PAGE = "is a page of HTML or XML and not the file; download it again, logged in."


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet", "in.csv", "in.json", "in.jsonl.gz"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines().decode().encode("utf-16"), UTF_16),
        (lines().decode().encode("utf-16-be"), UTF_16),
        (lines().decode().encode("utf-16-le"), UTF_16),
        (lines().decode().encode("utf-32"), UTF_32),
        (lines().decode().encode("utf-32-be"), UTF_32),
        (lines().decode().encode("utf-32-le"), UTF_32),
        ("\ufeff你好你好你好你好".encode("utf-16-le"), UTF_16),
        (LFS, LFS_SAID),
        (b"\n <!DOCTYPE html>\n<html>...", PAGE),
        (b"<html><body>Sign in", PAGE),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', PAGE),
        (b"PK\x03\x04more", "is a ZIP archive or a spreadsheet; unpack it, or save it as CSV."),
        (b"PARE\0\0\0\0PARE", "is an encrypted Parquet file; write it without encryption."),
        (b"ORC\x0a", "is an ORC file; write it as Parquet."),
        (b"Obj\x01\x04", "is an Avro file; write it as Parquet."),
        (b"SQLite format 3\0", "is an SQLite database; write its table as CSV or Parquet."),
        (b"\0" * 4096, "is no text and no table that we know; convert it."),
        (packed(LFS), LFS_SAID),
        (packed(packed(lines())), "is packed twice; unpack it once."),
        (packed(b"in.jsonl".ljust(257, b"\0") + b"ustar"), "is a tar archive; unpack it."),
        (packed(parquet()), "is a packed parquet file; unpack it first."),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, content, said):
    written(tmp_path, name, content)
    with pytest.raises(UsageError) as error:
        start(tmp_path, inputs=(f"{tmp_path}/{name}",), opener=refuse_to_open)
    assert str(error.value) == f"{tmp_path}/{name}: {said}"
    assert not (tmp_path / "out.jsonl.run").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.json", ARRAY[:-1], "its JSON array has no end; copy or write it again."),
        ("in.json", PRETTY[:-40], "its JSON array has no end; copy or write it again."),
        ("in.json", PRETTY + b"\n[]", "goes on behind the end of its JSON array; write one record"),
        ("in.json", OBJECTS[:-1], "its last object has no end; copy or write it again."),
        ("in.csv", b'prompt\na\n"b\nc\n', "3: a quote opens here that nothing closes; repair it."),
        ("in.csv", b"prompt,x,x\na,b,c\n", "two columns share a name; rename one of them."),
        ("in.csv", b"pr\xe9mpt\na\n", "its first line is no header in UTF-8"),
        ("in.arrow", ipc(pa.ipc.new_file)[:200], "not a whole Arrow file ("),
        ("in.parquet", parquet()[:-9], "not a whole Parquet file ("),
        ("in.txt", b"What is a sea?\n", "expected one of .jsonl, .json, .csv, .tsv, .parquet"),
        ("in.yaml", b"inputs: x", "expected one of .jsonl, .json"),
        ("in.jsonl", b"id,prompt\n1,What is a sea?\n", "is a table of text and no JSON; name it"),
        ("in.json", b'"id"\t"my prompt"\n1\ta\n', "is a table of text and no JSON; name it"),
        ("in.jsonl", b"What is a sea?\nWho am I?\n", "is no JSON, by its first lines; convert it."),
        ("in.jsonl", b"\x80\x04\x95 a pickle", "is no JSON, by its first lines; convert it."),
        ("in.jsonl.gz", b"# notes, here: packed\n", "is no JSON, by its first lines; convert it."),
        ("in.jsonl", b"prompt\nWhat, then?\n", "is a table of text and no JSON; name it .csv"),
    ],
)
def test_a_file_that_is_not_whole_is_one_sentence(tmp_path, name, content, said):
    written(tmp_path, name, content)
    with pytest.raises(UsageError, match=r"^[^\n]*$") as error:
        start(tmp_path, inputs=(f"{tmp_path}/{name}",), opener=refuse_to_open)
    assert str(error.value).removeprefix(f"{tmp_path}/{name}:").strip().startswith(said)


def test_a_long_string_and_escapes_at_the_end_of_a_piece_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark_batch.intake.files._PIECE_BYTES", 7)
    records = [{"a": "\\" * n + '"],[{' * n + "x" * n * n} for n in range(40)]
    source = written(tmp_path, "in.json", json.dumps(records).encode())
    assert [item.record for item in read([source])] == records


def test_a_bad_element_of_an_array_costs_itself(tmp_path):
    content = b'[{"prompt":"a"}, {"prompt":nan}, 7, , {"prompt":"]"},\n]'
    good, nan, number, empty, last = read([written(tmp_path, "in.json", content)])
    assert (good.record, last.record) == ({"prompt": "a"}, {"prompt": "]"})
    assert nan.message.startswith("in.json:2: not JSON")
    assert number.message.startswith("in.json:3: expected a JSON object")
    assert empty.message.startswith("in.json:4: not JSON")


def test_one_broken_line_at_the_beginning_makes_no_array_of_json_lines(tmp_path):
    content = b'[{"role":"user"}]\n{"prompt":"a"}\n'
    bad, good = read([written(tmp_path, "in.jsonl", content)])
    assert "found a list" in bad.message
    assert good.record == {"prompt": "a"}


def test_an_array_that_is_read_in_small_pieces_is_the_same(tmp_path, monkeypatch):
    for size in range(1, 20):
        monkeypatch.setattr("dspark_batch.intake.files._PIECE_BYTES", size)
        for content in (ARRAY, PRETTY, OBJECTS):
            items = read([written(tmp_path, "in.json", content)])
            assert [item.record for item in items] == RECORDS


def test_a_row_of_a_table_costs_itself(tmp_path):
    content = b'custom_id,prompt\n1,a\n2,b,c\n3,"d"e\n4,\xff\n5\n007,NA\n'
    records = list(read([written(tmp_path, "in.csv", content)]))
    assert [item_of(each).custom_id for each in records] == ["1", "#1", "#2", "4", "#4", "007"]
    assert [getattr(each, "message", "").partition("(")[0] for each in records] == [
        "",
        "in.csv:3: 3 fields, where the header has 2; repair it.",
        "in.csv:4: not a row of CSV ",
        "in.csv:5: the value of column `prompt` is not valid UTF-8 ",
        "in.csv:6: 1 fields, where the header has 2; repair it.",
        "",
    ]
    assert records[-1].record == {"custom_id": "007", "prompt": "NA"}  # text stays text


def test_a_field_may_be_longer_than_csv_allows_by_itself(tmp_path):
    (item,) = read([written(tmp_path, "in.csv", b"prompt\n" + b"x" * 300_000)])
    assert len(item.record["prompt"]) == 300_000


def test_standard_input_is_recognised_too(tmp_path, monkeypatch):
    piped = io.TextIOWrapper(io.BytesIO(packed(ARRAY)))
    monkeypatch.setattr("sys.stdin", piped)
    assert start(tmp_path, inputs=("-",)).succeeded == 2


def test_rows_of_a_csv_come_out_with_its_columns(tmp_path):
    written(tmp_path, "in.csv", b"id,prompt,n\nx,a,007\n")
    start(tmp_path, inputs=(f"{tmp_path}/in.csv",))
    [row] = rows_in(tmp_path / "out.jsonl")
    assert (row["custom_id"], row["id"], row["n"]) == ("x", "x", "007")


def test_a_file_that_turns_into_something_else_while_the_job_runs_is_named(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", *prompts("a", "b"))

    def swap(tick):
        if tick.stage == "load":
            path.write_bytes(LFS)

    with pytest.raises(UsageError, match="is a Git LFS pointer"):
        start(tmp_path, observe=swap)
