"""A job file is the options under their own names; a mistake in it is found at once."""

from datetime import date
from pathlib import Path

import pytest

from dspark_batch.errors import UsageError
from dspark_batch.spec.job_file import read_job, text_of

TODAY = date(2025, 3, 9)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "job.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def read(write):
    return lambda text: read_job(write(text), TODAY)


def test_keys_are_fields_and_lists_are_tuples(read):
    assert read('stop = ["a", "b"]\nmax_tokens = 7\ntemperature = 1\noverwrite = true') == {
        "stop": ("a", "b"),
        "max_tokens": 7,
        "temperature": 1,
        "overwrite": True,
    }


def test_files_are_relative_to_the_job_file(read, tmp_path):
    job = read(
        'inputs = ["../in/*.jsonl", "/abs.jsonl", "-", "hf://datasets/a/b"]\nout = "o.jsonl"'
    )
    assert job["inputs"] == (
        f"{tmp_path.parent}/in/*.jsonl",
        "/abs.jsonl",
        "-",
        "hf://datasets/a/b",
    )
    assert job["out"] == f"{tmp_path}/o.jsonl"


def test_a_model_is_a_directory_beside_the_job_file_or_a_hub_id(read, tmp_path):
    (tmp_path / "mine").mkdir()
    job = read('target = "mine"\ndrafter = "org/drafter"')
    assert job == {"target": f"{tmp_path}/mine", "drafter": "org/drafter"}


def test_a_relative_job_file_gives_relative_names(write, tmp_path, monkeypatch):
    monkeypatch.chdir(write('inputs = ["in.jsonl"]').parent.parent)
    job = read_job(Path(tmp_path.name) / "job.toml", TODAY)
    assert job["inputs"] == (f"{tmp_path.name}/in.jsonl",)


def test_the_date_stands_in_the_names_of_files_only(read, tmp_path):
    job = read('inputs = ["{date}.jsonl"]\nout = "n-{date}.parquet"\nsystem_prompt = "{date}"')
    assert job["inputs"] == (f"{tmp_path}/2025-03-09.jsonl",)
    assert job["out"] == f"{tmp_path}/n-2025-03-09.parquet"
    assert job["system_prompt"] == "{date}"


def test_a_template_can_be_a_file_beside_it(read, tmp_path):
    (tmp_path / "t.txt").write_text("Naïve: {{ x }}", encoding="utf-8")
    assert read('template = "@t.txt"') == {"template": "Naïve: {{ x }}"}
    assert read('template = "{{ x }}"') == {"template": "{{ x }}"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "max_token = 5",
            "unknown key `max_token`; did you mean max_tokens. The keys are the options of "
            "`dspark-batch run`, with _ for -.",
        ),
        (
            "draft-length = 5",
            "unknown key `draft-length`; did you mean draft_length. The keys are the options of "
            "`dspark-batch run`, with _ for -.",
        ),
        (
            "zzz = 5",
            "unknown key `zzz`. The keys are the options of `dspark-batch run`, with _ for -.",
        ),
        ("slots = 4.0", 'slots is 4.0, expected a whole number or one of "auto".'),
        ("slots = true", 'slots is true, expected a whole number or one of "auto".'),
        (
            "draft_length = false",
            'draft_length is false, expected a whole number or one of "auto".',
        ),
        ('temperature = "hot"', 'temperature is "hot", expected a number.'),
        ("temperature = true", "temperature is true, expected a number."),
        ("overwrite = 1", "overwrite is 1, expected true or false."),
        ('inputs = "in.jsonl"', 'inputs is "in.jsonl", expected a list of strings, ["…"].'),
        ("stop = [1]", 'stop is [1], expected a list of strings, ["…"].'),
        ("out = 3", "out is 3, expected a string."),
        ("[sampling]\nseed = 3", 'sampling is a table, expected one of "coupled", "rejection".'),
        ("dtype = 16", 'dtype is 16, expected one of "float32", "bfloat16", "float16".'),
        ("deadline = 07:00:00", "deadline is 07:00:00, expected a string."),
        ('out = "{day}.jsonl"', "{day}.jsonl has {day}, but the only placeholder is {date}."),
    ],
)
def test_says_what_is_wrong(text, sentence, write):
    path = write(text)
    with pytest.raises(UsageError) as error:
        read_job(path, TODAY)
    assert str(error.value) == f"{path}: {sentence}"


@pytest.mark.parametrize("value", ["true", "false", '"yes"'])
def test_only_the_command_line_lets_a_model_run_code(value, write):
    path = write(f"trust_remote_code = {value}")
    with pytest.raises(UsageError) as error:
        read_job(path, TODAY)
    assert str(error.value) == (
        f"{path}: trust_remote_code cannot be allowed by a file; drop it, and say "
        "--trust-remote-code on the command line if you have read that code."
    )


@pytest.mark.parametrize("text", ["slots =", "slots = 1\nslots = 2", "a file of words"])
def test_says_what_is_no_toml(text, read):
    with pytest.raises(UsageError, match=r"not TOML \(.*\); repair it"):
        read(text)


def test_says_which_file_it_cannot_read(tmp_path, read):
    with pytest.raises(UsageError, match=r"no.toml: cannot be read \(No such file"):
        read_job(tmp_path / "no.toml", TODAY)
    with pytest.raises(UsageError, match=r"t.txt: cannot be read \(.*\); check what follows the @"):
        read('template = "@t.txt"')


def test_a_file_of_text_is_read_without_its_byte_order_mark_and_must_hold_some(tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfBe brief.\n")
    assert text_of("@marked.txt", tmp_path) == "Be brief."
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UsageError, match=r"blank.txt: holds no text; check what follows the @."):
        text_of("@blank.txt", tmp_path)
