"""What a value that JSON or Python has no word for costs: its record at most."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import rows_in, start

from dspark_batch.cli.main import main
from dspark_batch.intake.values import Unreadable, taken_of, values_of

LATE = 2**62  # ms: no calendar has it


def bad_text(*raw):
    return pa.array(raw, pa.binary()).view(pa.string())


def table(**columns):
    size = len(next(iter(columns.values())))
    return pa.table({"prompt": [f"p{i}" for i in range(size)], **columns})


def answered(folder, given, out="out.parquet", **options):
    pq.write_table(given, folder / "in.parquet")
    start(folder, inputs=(f"{folder}/in.parquet",), out=f"{folder}/{out}", **options)


@pytest.fixture(params=["without pandas", "with pandas"])
def pandas(request, monkeypatch):
    """Arrow asks for pandas where a time has nanoseconds; nothing may depend on it."""
    if request.param == "with pandas":
        pytest.importorskip("pandas")
    else:
        monkeypatch.setitem(sys.modules, "pandas", None)


@pytest.mark.usefixtures("pandas")
@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("drop", [(), ("x",)])
def test_nanoseconds_in_a_list_come_out_as_they_went_in(tmp_path, out, drop):
    kind = pa.large_list(pa.timestamp("ns"))
    x = pa.array([[1700000000000000001, 5], [], None], kind)
    answered(tmp_path, table(x=x), out, drop=drop)
    if out.endswith("parquet") and not drop:
        assert pq.read_table(tmp_path / out).column("x").combine_chunks().equals(x)
    assert main(["show", f"{tmp_path}/{out}"]) == 0
    assert main(["export", f"{tmp_path}/{out}", f"{tmp_path}/copy.jsonl"]) == 0
    rows = rows_in(tmp_path / "copy.jsonl")
    assert [row["status"] for row in rows] == ["succeeded"] * 3
    said = ["2023-11-14 22:13:20.000000001", "1970-01-01 00:00:00.000000005"]
    assert [row.get("x", "-") for row in rows] == (["-"] * 3 if drop else [said, [], None])


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize(
    ("x", "why"),
    [
        (bad_text(b"ok", b"h\xffe", None).dictionary_encode(), "not valid UTF-8"),
        (bad_text(b"ok", b"h\xffe", None), "not valid UTF-8 ('utf-8' codec can't decode byte"),
        (pa.array([0, LATE, None], pa.timestamp("ms")), f"that no calendar or clock has ({LATE})"),
        (pa.array([0, -LATE, 1], pa.timestamp("ms", "UTC")), f"no calendar or clock has ({-LATE})"),
        (pa.array([0, 2**31 - 1, 1], pa.date32()), "a time that no calendar or clock has"),
        (pa.array([0, -1, 1], pa.time64("us")), "a time that no calendar or clock has (-1)"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_said_costs_its_record_and_nothing_if_it_is_dropped(
    tmp_path, x, why, out
):
    for column in (x, pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), x)):
        answered(tmp_path, table(x=column), out, overwrite=True)
        copy = tmp_path / "copy.jsonl"
        assert main(["export", f"{tmp_path}/{out}", str(copy), "--overwrite"]) == 0
        first, bad, last = rows_in(copy)
        assert (first["error"], last["error"], bad["x"]) == (None, None, None)
        assert bad["error"]["code"] == "bad_record"
        where = f"{tmp_path}/in.parquet:2: the value of column `x` is "
        assert bad["error"]["message"].startswith(where)
        assert why in bad["error"]["message"]
        answered(tmp_path, table(x=column), out, overwrite=True, drop=("x",))
        answered(tmp_path, table(x=column), out, overwrite=True, keep=("prompt",))
        assert main(["export", f"{tmp_path}/{out}", str(copy), "--overwrite"]) == 0
        assert [row["error"] for row in rows_in(copy)] == [None] * 3


def test_a_bad_word_of_a_dictionary_does_not_get_into_the_output(tmp_path):
    words = bad_text(b"good", b"h\xffe")
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        x = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), words.cast(kind))
        given = table(x=x)
        with pa.ipc.new_file(f"{tmp_path}/in.arrow", given.schema) as writer:
            writer.write_table(given)
        out = f"{tmp_path}/out.parquet"
        start(tmp_path, inputs=(f"{tmp_path}/in.arrow",), out=out, overwrite=True)
        assert [row["x"] for row in rows_in(tmp_path / "out.parquet")] == ["good", None, None]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_column": "x"},
        {"template": "{{ x }}"},
        {"template": "{{ row.x }}"},
        {"template": "{% if x is defined %}{{ x }}{% else %}nothing{% endif %}"},
    ],
)
def test_a_dropped_column_that_is_asked_must_be_readable_all_the_same(tmp_path, options):
    given = table(x=bad_text(b"good", b"h\xffe"))
    answered(tmp_path, given, "out.jsonl", drop=("x",), **options)
    good, bad = rows_in(tmp_path / "out.jsonl")
    assert good["error"] is None
    assert "the value of column `x` is not valid UTF-8" in bad["error"]["message"]


def test_two_bad_values_are_two_records(tmp_path):
    raw = pa.array([b"\xff", b"\xfe"], pa.binary())
    given = pa.table({"prompt": ["same", "same"], "x": raw.view(pa.string())})
    answered(tmp_path, given, drop=("x",))
    first, second = (tmp_path / "out.parquet.run/rows.jsonl").read_bytes().splitlines()
    digest = lambda line: line.partition(b'"digest":"')[2][:32]  # noqa: E731
    assert digest(first) != digest(second)


def test_a_file_with_a_column_name_that_is_no_text_is_refused_in_a_sentence(tmp_path, capsys):
    pq.write_table(table(xyz=["a"]), tmp_path / "in.parquet")
    raw = (tmp_path / "in.parquet").read_bytes()
    (tmp_path / "in.parquet").write_bytes(raw.replace(b"xyz", b"x\xffz"))
    assert main(["run", f"{tmp_path}/in.parquet", "-o", f"{tmp_path}/out.jsonl"]) == 2
    assert "in.parquet: " in capsys.readouterr().err


twins = pa.StructArray.from_arrays([pa.array([1, 2]), pa.array(["a", None])], names=["k", "k"])
union = pa.UnionArray.from_dense(
    pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array(["a", "b"]), twins]
)


MAP = pa.map_(pa.string(), pa.list_(pa.int8()))
ZERO = "00000000-0000-0000-0000-000000000000"
uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * 2, pa.binary(16)))


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (twins, [[["k", 1], ["k", "a"]], [["k", 2], ["k", None]]]),
        (union, ["a", [["k", 1], ["k", "a"]], "b"]),
        (pa.array([2**100], pa.decimal128(38, 0)), [str(2**100)]),
        (pa.array([-(10**75)], pa.decimal256(76, 0)), [str(-(10**75))]),
        (pa.array([253402300800], pa.timestamp("s")), ["10000-01-01 00:00:00"]),
        (pa.array([-62135596801], pa.timestamp("s")), ["0000-12-31 23:59:59"]),
        (pa.array([0], pa.timestamp("ms", "Europe/Paris")), ["1970-01-01 01:00:00.000+0100"]),
        (pa.array([0], pa.timestamp("s", "No/Where")), ["1970-01-01 00:00:00Z"]),
        (
            pa.array([None, [("k", [1])]], pa.map_(pa.string(), pa.list_(pa.int8()))),
            [None, [["k", [1]]]],
        ),
        (pa.array([["a"], None], pa.list_view(pa.string_view())), [["a"], None]),
        (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), [[1, 2], None]),
        (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), [[1, 2, 3]]),
        (pa.array([b"\xff", None], pa.binary_view()), ["/w==", None]),
        (pa.array([{}, None], pa.struct([])), [{}, None]),
        (pa.RunEndEncodedArray.from_arrays([2, 3], ["a", None]), ["a", "a", None]),
        (bad_text(b"\xff", b"b"), [Unreadable(values_of(bad_text(b"\xff"))[0].why, "/w=="), "b"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_what_a_value_is_in_json(array, values):
    assert values_of(array) == values
    assert values_of(array.slice(1)) == values[1:]
    assert values_of(taken_of(array, [0, None, 0])) == [values[0], None, values[0]]
    assert values_of(taken_of(array, [])) == []


@pytest.mark.parametrize(
    ("kind", "numbers", "said"),
    [
        ("us", [253402214400000000, -1], "9999-12-31 00:00:00.000000"),  # nanoseconds end in 2262
        ("ns", [1700000000000000001, 5], "2023-11-14 22:13:20.000000001"),
    ],
)
def test_the_times_of_hive_and_spark_are_right_in_any_year(tmp_path, kind, numbers, said):
    at = pa.array([numbers[0], None, numbers[1]], pa.timestamp(kind))
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), at)
    int96 = {"use_deprecated_int96_timestamps": True}
    pq.write_table(table(at=at, lists=lists), tmp_path / "in.parquet", **int96)
    for out in ("out.parquet", "out.jsonl"):
        start(tmp_path, inputs=(f"{tmp_path}/in.parquet",), out=f"{tmp_path}/{out}")
    assert pq.read_table(tmp_path / "out.parquet").column("at").combine_chunks().equals(at)
    first = rows_in(tmp_path / "out.jsonl")[0]
    assert (first["at"], first["lists"]) == (said, [said])


def test_what_is_nested_too_deeply_for_parquet_becomes_text_there(tmp_path):
    deep = pa.array([1, 2])
    for _ in range(60):  # as deep as an Arrow file can
        deep = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), deep)
    given = table(x=deep)
    with pa.ipc.new_file(f"{tmp_path}/in.arrow", given.schema) as writer:
        writer.write_table(given)
    for out in ("out.parquet", "out.jsonl"):
        report = start(tmp_path, inputs=(f"{tmp_path}/in.arrow",), out=f"{tmp_path}/{out}")
        assert report.succeeded == 2
        assert main(["show", f"{tmp_path}/{out}"]) == 0
        assert main(["export", f"{tmp_path}/{out}", f"{tmp_path}/x.jsonl", "--overwrite"]) == 0
        assert len(rows_in(tmp_path / out)) == 2


MESSAGES = pa.list_(pa.struct({"role": pa.binary(), "content": pa.large_binary()}))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3)])
def test_text_that_is_stored_as_binary_is_asked_as_text(tmp_path, kind):
    given = pa.table({"prompt": pa.array([b"abc", b"d\xc3\xa9", b"x\xffy"], kind)})
    answered(tmp_path, given)
    first, second, bad = rows_in(tmp_path / "out.parquet")
    assert [first["usage"]["prompt_tokens"], second["usage"]["prompt_tokens"]] == [9, 8]
    assert [first["prompt"], bad["prompt"]] == [b"abc", None]  # as it went in
    assert "the value of column `prompt` is not valid UTF-8" in bad["error"]["message"]
    answered(tmp_path, given, "out.jsonl", template="{{ prompt }}", overwrite=True)
    assert [row.get("prompt") for row in rows_in(tmp_path / "out.jsonl")] == [
        "abc",
        "d\u00e9",
        None,
    ]


def test_messages_that_are_stored_as_binary_are_a_conversation(tmp_path):
    chat = [{"role": b"user", "content": b"hello"}]
    given = pa.table({"id": [b"one"], "messages": pa.array([chat], MESSAGES), "x": [b"\xff\x00"]})
    answered(tmp_path, given, "out.jsonl")
    [row] = rows_in(tmp_path / "out.jsonl")
    assert (row["custom_id"], row["usage"]["prompt_tokens"]) == ("one", len("user:hello\n"))
    assert (row["error"], row["x"]) == (None, "/wA=")  # nobody asks it: base64
