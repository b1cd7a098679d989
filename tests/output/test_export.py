"""An export has the rows of the output, whatever file it is, and however far the job is."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FakeEngine
from small_jobs import rows_in, start, write_lines

from dspark_batch.cli.main import main
from dspark_batch.errors import UsageError
from dspark_batch.output.export import export, export_inputs
from dspark_batch.spec.where import Where

LINES = [
    {"id": "a", "prompt": "one", "tags": ["x"], "number": 1},
    {"id": "b", "prompt": "two", "tags": None, "number": None},
    {"id": "c", "prompt": None, "tags": [], "number": 2.5},
    {"id": "d", "prompt": "four"},
]


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *LINES)
    return tmp_path


def exported(folder, to, out="out.jsonl", **options):
    export(str(folder / out), str(folder / to), **options)
    return rows_in(folder / to)


def test_json_lines_become_the_parquet_that_the_run_would_have_written(folder):
    start(folder)
    start(folder, out=str(folder / "own.parquet"))
    exported(folder, "copy.parquet")
    copy, own = (pq.read_table(folder / name) for name in ("copy.parquet", "own.parquet"))
    assert copy.schema == own.schema
    assert copy.drop_columns("metrics") == own.drop_columns("metrics")


def test_parquet_becomes_the_json_lines_that_the_run_would_have_written(folder):
    start(folder, out=str(folder / "out.parquet"))
    rows = exported(folder, "copy.jsonl", "out.parquet")
    start(folder)
    own = rows_in(folder / "out.jsonl")
    for row in (*rows, *own):
        del row["metrics"]
    # A table has every column in every row.
    assert rows == [{"tags": None, "number": None} | row for row in own]


def test_a_column_of_ours_keeps_its_type_also_where_all_values_are_null(folder):
    start(folder, output_prefix="my_", output_column="answer")
    exported(folder, "copy.parquet")
    types = {field.name: field.type for field in pq.read_schema(folder / "copy.parquet")}
    assert types["my_verified"] == pa.bool_()
    assert types["my_reasoning"] == types["answer"] == pa.string()


@pytest.mark.parametrize("to", ["copy.jsonl", "copy.parquet"])
def test_only_the_chosen_columns_in_their_order(folder, to):
    start(folder)
    rows = exported(folder, to, columns=["status", "tags", "id"])
    assert [list(row) for row in rows] == [["status", "tags", "id"]] * 4
    assert [row["id"] for row in rows] == list("abcd")
    assert [row["tags"] for row in rows] == [["x"], None, [], None]


@pytest.mark.parametrize("to", ["copy.jsonl", "copy.parquet"])
@pytest.mark.parametrize(
    ("conditions", "ids"),
    [
        ([Where("status", "errored")], "c"),
        ([Where("error.code", "bad_record")], "c"),
        ([Where("status", "errored"), Where("number", "1")], "ac"),
        ([Where("number", "2.5")], "c"),
        ([Where("error.code", "engine")], ""),
        ([Where("error.code", "null")], "abd"),
    ],
)
def test_only_the_rows_for_which_a_condition_holds(folder, to, conditions, ids):
    start(folder)
    whole = exported(folder, f"whole-{to}")
    rows = exported(folder, to, where=conditions)
    assert rows == [row for row in whole if row["id"] in ids]
    if to == "copy.parquet":
        assert pq.read_schema(folder / to) == pq.read_schema(folder / f"whole-{to}")


@pytest.mark.parametrize("to", ["copy.jsonl", "copy.parquet"])
@pytest.mark.parametrize(
    ("column", "meant"), [("eror.code", "error.code"), ("error.cod", "error.code"), ("Id", "id")]
)
def test_a_condition_about_a_column_that_no_row_has_is_a_mistake(folder, to, column, meant):
    start(folder)
    for value in ("x", "null"):
        where = [Where("status", "succeeded"), Where(column, value)]
        said = f"--where {column}={value}: no row of .* has such a column; did you mean {meant}; "
        for write in (export, export_inputs):
            if write is export or to.endswith(".jsonl"):
                with pytest.raises(UsageError, match=said):
                    write(f"{folder}/out.jsonl", f"{folder}/{to}", where=where)
    assert not (folder / to).exists()


def test_records_whose_answer_was_cut_can_run_again_with_more_room(folder):
    write_lines(folder / "in.jsonl", *LINES, {"prompt": "no id"}, b"nope")
    start(folder, keep=("id",), max_tokens=3, samples=2, output_prefix="our_")
    cut = [Where("our_finish_reason", "length")]
    number = export_inputs(f"{folder}/out.jsonl", f"{folder}/again.jsonl", where=cut)
    records = rows_in(folder / "again.jsonl")
    assert records == [LINES[0], LINES[3], {"custom_id": "#4", "prompt": "no id"}]
    assert number == 3  # the answer to b ended by itself
    longer = {"inputs": (f"{folder}/again.jsonl",), "out": f"{folder}/longer.jsonl"}
    assert start(folder, max_tokens=9, **longer).succeeded == 3
    assert [row["custom_id"] for row in rows_in(folder / "longer.jsonl")] == ["a", "d", "#4"]


def test_what_could_not_be_read_is_told_and_not_copied(folder, capsys):
    write_lines(folder / "in.jsonl", LINES[0], b"nope", {"prompt": 3}, b'{"prompt"')
    start(folder, samples=2)
    words = ["export", f"{folder}/out.jsonl", f"{folder}/again.jsonl", "--inputs"]
    assert main([*words, "--where", "status=errored"]) == 0
    assert rows_in(folder / "again.jsonl") == [{"custom_id": "#2", "prompt": 3}]
    said = capsys.readouterr().err
    assert "again.jsonl: 2 of the records cannot be copied and are left out; the first: " in said
    assert "in.jsonl:2: not JSON" in said
    assert main([*words, "--where", "status=succeeded", "--overwrite"]) == 0
    assert capsys.readouterr().err == ""


def test_the_records_of_an_unfinished_job_in_the_openai_format(folder):
    asked = {"custom_id": "x", "url": "/v1/completions", "body": {"prompt": "p"}}
    write_lines(folder / "in.jsonl", asked, asked | {"custom_id": "y"})
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=1), format="openai")
    export_inputs(f"{folder}/out.jsonl", f"{folder}/again.jsonl")
    assert rows_in(folder / "again.jsonl") == [asked]


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_a_job_that_is_not_finished_gives_the_rows_there_are(folder, out):
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=3, dies_after=2), out=str(folder / out))
    before = {path.name for path in folder.iterdir()}
    rows = exported(folder, "partial.jsonl", out)
    assert [row["id"] for row in rows] == ["b", "c"]  # the fake answers its slots from the last
    assert [row["status"] for row in rows] == ["succeeded", "errored"]
    assert {path.name for path in folder.iterdir()} == before | {"partial.jsonl"}
    start(folder, out=str(folder / out))  # and nothing is spoilt
    assert len(rows_in(folder / out)) == 4


def test_samples_of_an_unfinished_job_stay_with_their_record(folder):
    options = {"samples": 2, "out": str(folder / "out.parquet")}
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=3), temperature=1.0, **options)
    rows = exported(folder, "partial.parquet", "out.parquet", columns=["id", "sample_index"])
    assert rows == [
        {"id": "a", "sample_index": 0},
        {"id": "a", "sample_index": 1},
        {"id": "b", "sample_index": 0},
    ]


def test_a_running_job_can_be_exported(folder):
    seen = []

    def watch(tick):
        if tick.done == 2 and tick.outcome:
            seen.append(len(exported(folder, "now.parquet", overwrite=True)))

    start(folder, observe=watch)
    assert seen == [2]


def test_an_output_that_was_moved_away_from_its_run_is_enough(folder):
    start(folder)
    (folder / "out.jsonl").rename(folder / "moved.jsonl")
    assert len(exported(folder, "copy.parquet", "moved.jsonl")) == 4


@pytest.mark.parametrize(
    ("to", "options", "says"),
    [
        ("copy.csv", {}, "expected a name that ends in .jsonl or .parquet"),
        ("old.jsonl", {}, "old.jsonl exists; choose another name, or replace it with --overwrite"),
        (
            "in.jsonl",
            {"overwrite": True},
            "in.jsonl: belongs to the job of .*; choose another name",
        ),
        ("out.jsonl", {"overwrite": True}, "out.jsonl: belongs to the job of .*out.jsonl; choose"),
        ("copy.jsonl", {"columns": ["id", "colour"]}, "no column `colour`; columns are `id`"),
        ("copy.parquet", {"columns": ["colour"]}, "no column `colour`; columns are `id`"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(folder, to, options, says):
    start(folder)
    write_lines(folder / "old.jsonl", {})
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    with pytest.raises(UsageError, match=says):
        export(str(folder / "out.jsonl"), str(folder / to), **options)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == before


def test_the_command_counts_what_it_wrote(folder, capsys):
    start(folder)
    words = ["export", f"{folder}/out.jsonl", f"{folder}/some.jsonl", "--columns", "id, status"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"4 rows in {folder}/some.jsonl\n"
    first = (folder / "some.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"id": "a", "status": "succeeded"}
    assert main(words[:2]) == 2
    assert "nowhere to export to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["some.jsonl", "--where", "id=b", "--where=id=c"], "2 rows in some.jsonl"),
        (["some.jsonl", "--inputs", "--where", "status=succeeded"], "3 records in some.jsonl"),
        (["some.parquet", "--inputs"], "some.parquet: --inputs are written to a name that ends"),
        (["some.jsonl", "--inputs", "--columns=id"], "--inputs takes whole records"),
        (["some.jsonl", "--where=id"], "--where id: expected COLUMN=VALUE"),
        (["--where=id=b", "--push-to-hub=o/n"], "--inputs and --where are for a file"),
    ],
)
def test_the_command_takes_conditions(folder, monkeypatch, capsys, words, said):
    monkeypatch.chdir(folder)
    start(folder)
    main(["export", "out.jsonl", *words])
    assert said in "".join(capsys.readouterr())


PLAIN = (pa.types.is_string, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)


def is_plain(kind):
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(is_plain(field.type) for field in kind)
    if pa.types.is_list(kind):
        return kind.value_field.name == "element" and is_plain(kind.value_type)
    return any(is_it(kind) for is_it in PLAIN)


def test_an_output_has_only_types_that_every_reader_of_parquet_knows(folder):
    start(folder, out=str(folder / "out.parquet"))
    schema = pq.read_schema(folder / "out.parquet")
    assert [field.name for field in schema if not is_plain(field.type)] == []
