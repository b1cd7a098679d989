"""What a user can get wrong: one sentence with where, what and what to do, and its exit code."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import refuse_to_open
from small_jobs import errors_in, prompts, rows_in, start, write_lines

from dspark_batch.errors import UsageError


def refused(folder, **options):
    """Return the sentence that a start is refused with, before any model is loaded."""
    with pytest.raises(UsageError) as error:
        start(folder, opener=refuse_to_open, **options)
    assert error.value.exit_code == 2
    assert not (folder / "out.jsonl").exists()
    return str(error.value).replace(f"{folder}/", "")


def test_a_missing_file(tmp_path):
    assert refused(tmp_path) == "in.jsonl: no such file; check the path."


def test_a_pattern_without_a_match(tmp_path):
    said = refused(tmp_path, inputs=(f"{tmp_path}/*.jsonl",))
    assert said == "*.jsonl: no file matches this pattern; check it from this directory."


def test_a_directory(tmp_path):
    (tmp_path / "in.jsonl").mkdir()
    said = refused(tmp_path)
    assert said == "in.jsonl: is a directory; name its files, for example 'in.jsonl/*.jsonl'."


def test_an_unknown_extension(tmp_path):
    (tmp_path / "in.txt").write_bytes(b"prompt\nhi\n")
    said = refused(tmp_path, inputs=(f"{tmp_path}/in.txt",))
    assert said == (
        "in.txt: expected one of .jsonl, .json, .csv, .tsv, .parquet, .arrow; convert or rename it."
    )


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "in.jsonl").write_bytes(content)
    assert refused(tmp_path) == "in.jsonl: holds no records; give it at least one line or row."


def test_a_parquet_file_without_rows(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "in.parquet")
    said = refused(tmp_path, inputs=(f"{tmp_path}/in.parquet",))
    assert said == "in.parquet: holds no records; give it at least one line or row."


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_file_that_is_not_parquet_to_its_end(tmp_path, keep):
    pq.write_table(pa.table({"prompt": ["a"] * 9}), tmp_path / "in.parquet")
    (tmp_path / "in.parquet").write_bytes((tmp_path / "in.parquet").read_bytes()[:keep])
    said = refused(tmp_path, inputs=(f"{tmp_path}/in.parquet",))
    assert said.startswith("in.parquet: not a whole Parquet file (")
    assert said.endswith("); copy or write it again.")


def test_a_parquet_file_with_a_damaged_page(tmp_path):
    table = pa.table({"prompt": [f"prompt number {i}" for i in range(999)]})
    pq.write_table(table, tmp_path / "in.parquet", compression="zstd")
    raw = bytearray((tmp_path / "in.parquet").read_bytes())
    raw[30:900] = bytes(870)
    (tmp_path / "in.parquet").write_bytes(raw)
    said = refused(tmp_path, inputs=(f"{tmp_path}/in.parquet",))
    assert said.startswith("in.parquet: cannot be read from row 1 on (")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("missing", [1, 9, 30])
def test_a_compressed_file_that_ends_early(tmp_path, suffix, missing):
    plain = b"".join(b'{"prompt":"%d"}\n' % i for i in range(500))
    packed = gzip.compress(plain) if suffix == "gz" else pa.compress(plain, "zstd", asbytes=True)
    (tmp_path / f"in.jsonl.{suffix}").write_bytes(packed[:-missing])
    said = refused(tmp_path, inputs=(f"{tmp_path}/in.jsonl.{suffix}",))
    assert said.startswith(f"in.jsonl.{suffix}: cannot be read to its end (")


def test_an_output_below_a_file(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    said = refused(tmp_path, out=f"{tmp_path}/in.jsonl/out.jsonl")
    assert said == (
        "in.jsonl/out.jsonl.run: the run directory cannot be made here (Not a directory); choose "
        "an output in a directory that you can write to."
    )


def test_an_output_that_is_an_input(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    said = refused(tmp_path, out=f"{tmp_path}/in.jsonl")
    assert said == "in.jsonl is an input as well; choose another output."
    (tmp_path / "alias.jsonl").hardlink_to(tmp_path / "in.jsonl")
    assert "is an input as well" in refused(tmp_path, out=f"{tmp_path}/alias.jsonl")


def test_an_output_that_a_pattern_takes_as_an_input(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    start(tmp_path, inputs=(f"{tmp_path}/*.jsonl",), out=f"{tmp_path}/rows.jsonl")
    said = refused(tmp_path, inputs=(f"{tmp_path}/*.jsonl",), out=f"{tmp_path}/rows.jsonl")
    assert said == "rows.jsonl is an input as well; choose another output."


def test_an_output_that_is_a_directory(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    (tmp_path / "rows.jsonl").mkdir()
    said = refused(tmp_path, out=f"{tmp_path}/rows.jsonl")
    assert said == "rows.jsonl: is a directory; name a file."


def test_an_output_that_nobody_knows(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    (tmp_path / "rows.jsonl").write_bytes(b"precious\n")
    said = refused(tmp_path, out=f"{tmp_path}/rows.jsonl")
    assert said == (
        "rows.jsonl exists, and it is not the output of a job in rows.jsonl.run; choose another "
        "output, or replace it with --overwrite."
    )
    assert (tmp_path / "rows.jsonl").read_bytes() == b"precious\n"


@pytest.mark.parametrize("record", [{"prompt": "a", "status": "new"}, {"x": 1, "metrics": None}])
def test_a_column_with_one_of_our_names(tmp_path, record):
    write_lines(tmp_path / "in.jsonl", *prompts("a"), record)
    name = ({*record} & {"status", "metrics"}).pop()
    assert refused(tmp_path) == (
        f"in.jsonl:2: the input has a column `{name}`, which is one of ours; tell them apart with "
        "--output-prefix, or leave it out with --drop."
    )


def test_two_columns_with_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "in.parquet")
    said = refused(tmp_path, inputs=(f"{tmp_path}/in.parquet",))
    assert said == "in.parquet: two columns share a name; rename one of them."


def test_every_bad_record_becomes_a_failure_row_and_the_rest_is_answered(tmp_path):
    write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "good"},
        b'{"prompt": "cut',
        b'{"prompt": NaN}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'["prompt"]',
        {"text": "x", "n": 1},
        {"prompt": 5},
        {"prompt": ""},
        {"prompt": "x" * 500},
        {"prompt": "good too"},
    )
    report = start(tmp_path)
    assert (report.succeeded, report.errored, report.exit_code) == (2, 9, 1)
    messages = [error and error["message"] for error in errors_in(tmp_path / "out.jsonl")]
    assert [
        m and m.startswith(f"{tmp_path}/in.jsonl:{n}: ") for n, m in enumerate(messages, 1)
    ] == [*(None, *[True] * 9, None)]
    assert [m and m.removeprefix(f"{tmp_path}/in.jsonl:") for m in messages[5:]] == [
        '6: expected a JSON object such as {"prompt": "…"}, found a list.',
        "7: no `prompt` or `messages`; columns are `text`, `n`; name the right one with "
        "--prompt-column or --messages-column.",
        "8: `prompt` is a number, expected a string.",
        "9: `prompt` is empty; there is nothing to answer.",
        "10: 506 prompt tokens leave no room in a context of 400; shorten the prompt by 107 tokens "
        "or more.",
        None,
    ]
    codes = {row["error"]["code"] for row in rows_in(tmp_path / "out.jsonl") if row["error"]}
    assert codes == {"bad_record", "prompt_too_long"}


def test_a_job_of_bad_records_alone_still_finishes(tmp_path):
    write_lines(tmp_path / "in.jsonl", b"{x", b"{y")
    report = start(tmp_path, out=f"{tmp_path}/out.parquet")
    assert (report.total, report.errored, report.exit_code) == (2, 2, 1)
    assert [row["status"] for row in rows_in(tmp_path / "out.parquet")] == ["errored"] * 2
