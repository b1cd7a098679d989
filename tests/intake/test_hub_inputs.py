"""Inputs on the Hub, behind a stand-in for the client's file system that knows one data set."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import refuse_to_open
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.errors import UsageError

DATA_SET = "hf://datasets/org/set"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Files of `datasets/org/set`, and the calls that were made."""
    remote = tmp_path / "remote"
    folder = remote / "datasets/org/set"
    (folder / "more").mkdir(parents=True)
    calls = []

    class StandIn:
        """Names as the real one takes and gives them: with the scheme in, without it out."""

        def glob(self, pattern):
            calls.append("glob")
            names = (str(p.relative_to(remote)) for p in remote.rglob("*") if p.is_file())
            pattern = pattern.removeprefix("hf://")
            return [name for name in names if fnmatch(name, pattern)]

        def get_file(self, name, local):
            calls.append("get")
            path = remote / name.removeprefix("hf://")
            if not path.exists():
                raise FileNotFoundError(f"{name}\nmore lines")
            shutil.copyfile(path, local)

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", StandIn)
    write_lines(folder / "b.jsonl", *prompts("b"))
    write_lines(folder / "a.jsonl", *prompts("a"))
    pq.write_table(pa.table({"prompt": ["c"], "id": ["id-c"]}), folder / "more/c.parquet")
    return folder, calls


def ids(tmp_path, *inputs, **options):
    start(tmp_path, inputs=inputs, **options)
    return [row["custom_id"] for row in rows_in(tmp_path / "out.jsonl")]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("b.jsonl", ["id-b"]),
        ("*.jsonl", ["id-a", "id-b"]),
        ("more/c.parquet", ["id-c"]),
    ],
)
def test_a_name_or_a_pattern_is_read_in_name_order(tmp_path, name, found):
    assert ids(tmp_path, f"{DATA_SET}/{name}") == found


def test_messages_and_manifest_name_the_file_on_the_hub(tmp_path, hub):
    folder, _ = hub
    write_lines(folder / "a.jsonl", b"{nope")
    start(tmp_path, inputs=(f"{DATA_SET}/a.jsonl",))
    [row] = rows_in(tmp_path / "out.jsonl")
    assert row["error"]["message"].startswith(f"{DATA_SET}/a.jsonl:1: not JSON")


def test_a_file_is_fetched_once_and_again_when_all_starts_over(tmp_path, hub):
    folder, calls = hub
    name = f"{DATA_SET}/a.jsonl"
    assert ids(tmp_path, name) == ["id-a"]
    write_lines(folder / "a.jsonl", *prompts("new"))
    assert ids(tmp_path, name, opener=refuse_to_open) == ["id-a"]
    assert calls == ["get"]
    assert ids(tmp_path, name, overwrite=True) == ["id-new"]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("hf://datasets/org/set", "expected a file, hf://datasets/OWNER/NAME/PATH; a whole"),
        ("hf://datasets/org//a.jsonl", "expected a file"),
        ("hf://datasets/org/set/../a.jsonl", "expected a file"),
        (f"{DATA_SET}/no*.jsonl", "no file of the data set matches this pattern"),
        (
            f"{DATA_SET}/no.jsonl",
            "cannot be fetched from the Hub (hf://datasets/org/set/no.jsonl).",
        ),
    ],
)
def test_says_what_is_wrong_with_a_name(tmp_path, name, sentence):
    with pytest.raises(UsageError) as error:
        start(tmp_path, inputs=(name,))
    assert str(error.value).startswith(f"{name}: {sentence}")
    assert not list(Path(tmp_path).rglob("*.tmp"))


def test_half_a_parquet_file_is_refused(tmp_path, hub):
    folder, _ = hub
    (folder / "half.parquet").write_bytes((folder / "more/c.parquet").read_bytes()[:100])
    with pytest.raises(UsageError, match=r"half.parquet: not a whole Parquet file"):
        start(tmp_path, inputs=(f"{DATA_SET}/half.parquet",))
