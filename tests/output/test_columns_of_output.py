"""Which input columns an output has, and what the completion is called."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import rows_in, start, write_lines

from dspark_batch.errors import UsageError
from dspark_batch.record.rows import ROW_SCHEMA


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a", "x": 1, "y": 2}, {"prompt": "b", "z": 3})
    return tmp_path


def theirs(path):
    return [[name for name in row if name not in ROW_SCHEMA.names] for row in rows_in(path)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("options", "columns"),
    [({"keep": ("x", "prompt")}, ["prompt", "x"]), ({"drop": ("y", "z")}, ["prompt", "x"])],
)
def test_keeps_or_drops_columns(folder, options, columns, suffix):
    out = folder / f"out.{suffix}"
    start(folder, out=str(out), **options)
    assert theirs(out)[0] == columns


def test_a_dropped_column_may_have_one_of_our_names(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a", "status": "old"})
    start(tmp_path, drop=("status",))
    assert [row["status"] for row in rows_in(tmp_path / "out.jsonl")] == ["succeeded"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_completion_can_have_another_name(folder, suffix):
    out = folder / f"out.{suffix}"
    start(folder, out=str(out), output_column="summary", output_prefix="o_")
    row = rows_in(out)[0]
    assert row["summary"]
    assert {"o_status", "o_usage"} <= row.keys()
    assert not {"completion", "o_completion", "o_summary"} & row.keys()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"keep": ("propmt",)},
            "--keep names a column `propmt` that no record of {} has; did you mean prompt; columns "
            "are `prompt`, `x`, `y`.",
        ),
        (
            {"drop": ("nothing",)},
            "--drop names a column `nothing` that no record of {} has; columns are `prompt`, `x`, "
            "`y`.",
        ),
        (
            {"prompt_column": "Prompt"},
            "--prompt-column names a column `Prompt` that no record of {} has; did you mean "
            "prompt; columns are `prompt`, `x`, `y`.",
        ),
        (
            {"template": "{{ w }}"},
            "--template names a column `w` that no record of {} has; columns are `prompt`, `x`, "
            "`y`.",
        ),
        (
            {"output_column": "status"},
            "--output-column status is another of our columns; take another name.",
        ),
    ],
)
def test_a_column_that_cannot_be_is_refused_at_once(folder, options, sentence):
    with pytest.raises(UsageError) as error:
        start(folder, **options)
    assert str(error.value) == sentence.format(folder / "in.jsonl")


def test_an_output_column_that_the_input_has_is_refused(folder):
    with pytest.raises(UsageError, match="the input has a column `x`, which is one of ours"):
        start(folder, output_column="x")


def test_a_file_without_any_prompt_is_refused_at_once(tmp_path):
    write_lines(tmp_path / "in.jsonl", b"nope", {"question": "a"})
    with pytest.raises(UsageError) as error:
        start(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/in.jsonl: no record has a `prompt`, or another known shape of a prompt; "
        "columns are `question`; name the right one with --prompt-column or --messages-column."
    )


def test_a_column_of_one_record_is_enough(folder):
    assert start(folder, keep=("z",)).exit_code == 0
    assert start(folder, overwrite=True, drop=("z", "x")).exit_code == 0


def test_a_file_without_a_readable_record_is_no_misspelling(tmp_path):
    write_lines(tmp_path / "in.jsonl", b"{nope", b"[]")
    assert start(tmp_path, keep=("x",)).errored == 2


def test_a_column_of_nulls_keeps_the_type_that_a_table_gave_it(tmp_path):
    table = pa.table({"prompt": ["a"], "nothing": pa.nulls(1), "list": pa.array([[None]])})
    pq.write_table(table, tmp_path / "in.parquet")
    start(tmp_path, inputs=(f"{tmp_path}/in.parquet",), out=f"{tmp_path}/out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").select(table.schema.names) == table
    write_lines(tmp_path / "in.jsonl", {"prompt": "a", "nothing": None})
    start(tmp_path, out=f"{tmp_path}/lines.parquet")
    assert pq.read_schema(tmp_path / "lines.parquet").field("nothing").type == pa.string()
