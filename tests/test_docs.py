"""The pages for users say what the code does.

What README.md (or a page in docs/) must hold:
- every option of `run`, in one of its spellings: `--max-tokens`, `-o`;
- a table under the heading `| exit code | ... |`, one line each: `| 75 | stopped early ... |`;
- every column of a row, in backticks: `finish_reason`.
docs/DESIGN.md does not count: it is for people who change the code.
"""

import json
import re
import shutil
from dataclasses import fields
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest

import dspark_batch.errors
from dspark_batch.cli import main
from dspark_batch.cli.run_command import run_command
from dspark_batch.cli.serve_command import serve_command
from dspark_batch.errors import DsparkBatchError
from dspark_batch.intake import openai
from dspark_batch.intake.mapping import to_request
from dspark_batch.output.report import Report
from dspark_batch.record.rows import ROW_SCHEMA
from dspark_batch.spec.job_file import read_job
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item, Request

ROOT = Path(__file__).parents[1]
PARAMETERS = [*run_command.params, *serve_command.params]
OPTIONS = [each.opts for each in PARAMETERS if each.opts[0].startswith("-")]
# Of click, of systemctl, of other programs, and of our benchmarks.
OF_OTHERS = {"--help", "--version", "--user", "--now", "--items", "--alone", "--repeats"}
OF_OTHERS |= {"--array", "--time"}  # of sbatch
OF_OTHERS |= {"--head", "--address", "--resources", "--node-ip-address"}  # of `ray start`
OF_OTHERS |= {"--min-worker-port", "--max-worker-port"}
OF_OTHERS |= {"--draft", "--draft-model", "--num-draft-tokens"}
OF_OTHERS |= {"--name", "--network", "--add-host"}
OF_OTHERS |= {"--outside", "--batch-sizes", "--draft-lengths", "--system-tokens", "--no-generate"}
EXIT_CODES = {0, 1, main.INTERRUPTED, main.TERMINATED} | {
    error.exit_code
    for error in vars(dspark_batch.errors).values()
    if isinstance(error, type) and issubclass(error, DsparkBatchError)
}


@pytest.fixture(scope="module")
def pages():
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return "\n".join(path.read_text() for path in paths if path.name != "DESIGN.md")


@pytest.mark.parametrize("spellings", OPTIONS, ids=" ".join)
def test_every_option_is_described(spellings, pages):
    assert re.search(rf"(?<![\w-])({'|'.join(spellings)})(?![\w-])", pages)


def test_no_page_names_an_option_that_does_not_exist(pages):
    parameters = [each for command in main.cli.commands.values() for each in command.params]
    options = {word for each in parameters for word in each.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", pages)) <= options | OF_OTHERS


def test_the_table_of_exit_codes_is_complete_and_true(pages):
    _, _, below = pages.partition("| exit code |")
    table, _, _ = below.partition("\n\n")
    assert {int(code) for code in re.findall(r"^\| *(\d+) *\|", table, re.MULTILINE)} == EXIT_CODES


@pytest.mark.parametrize("column", ROW_SCHEMA.names)
def test_every_column_of_a_row_is_described(column, pages):
    assert f"`{column}`" in pages


def test_every_error_is_drawn_in_the_tree_with_its_exit_code():
    drawn = dict(re.findall(r"^\W*([A-Z]\w+) +(\d+)  ", dspark_batch.errors.__doc__, re.MULTILINE))
    tree = {
        error.__name__: str(error.exit_code)
        for error in vars(dspark_batch.errors).values()
        if isinstance(error, type) and issubclass(error, DsparkBatchError)
    }
    assert drawn == tree


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", ["jobs.md", "labelling.md", "nightly.md"])
def test_the_job_files_that_pages_show_are_job_files(page, tmp_path):
    path = tmp_path / "job.toml"
    (tmp_path / "question.txt").write_text("{{ x }}")
    shutil.copy(ROOT / "jobs" / "order.schema.json", tmp_path)
    for block in blocks(page, "toml"):
        path.write_text(block)
        Spec(**{"inputs": ("in.jsonl",), "out": "o.jsonl"} | read_job(path, date(2025, 3, 9)))


def test_every_job_file_is_listed():
    page = (ROOT / "docs" / "jobs.md").read_text()
    for path in (ROOT / "jobs").glob("*.toml"):
        assert f"| `{path.name}` |" in page


def test_the_request_that_the_page_shows_is_one():
    record = json.loads(blocks("migrating.md", "json")[0])
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl")
    asked = to_request(Item(0, "0", "d", "in.jsonl:1", record), spec, lambda m: [1], 9)
    assert isinstance(asked, Request)


@pytest.mark.parametrize("field", [*openai.HARMLESS, *openai.CHOICES, *openai.ONLY])
def test_every_field_of_a_body_is_described(field):
    assert f"`{field}`" in (ROOT / "docs" / "migrating.md").read_text()


def test_every_help_in_a_page_is_what_the_program_says(pages, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    shown = re.findall(r"^\$ dspark-batch ((?:[\w-]+ )*)--help\n(.*?)^```", pages, re.M | re.S)
    assert shown
    for words, text in shown:
        main.main([*words.split(), "--help"])
        assert capsys.readouterr().out == text


def test_the_page_of_a_row_has_every_field_and_its_type():
    page = (ROOT / "docs" / "schema.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| ([\w ]+) \|", page, re.MULTILINE)
    assert rows == [(name, type_name(kind)) for name, kind in leaves(ROW_SCHEMA)]


def test_the_page_of_a_report_has_every_field_of_its_json():
    page = (ROOT / "docs" / "report.md").read_text()
    _, _, below = page.partition("| field | what it is |\n|---|---|\n")
    table, _, _ = below.partition("\n\n")
    described = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE)))
    assert sorted(described) == sorted(field.name for field in fields(Report))


def leaves(fields, before=""):
    for field in fields:
        if pa.types.is_struct(field.type):
            yield from leaves(field.type, f"{before}{field.name}.")
        else:
            yield before + field.name, field.type


def type_name(kind):
    return f"list of {type_name(kind.value_type)}" if pa.types.is_list(kind) else str(kind)


def test_every_picture_and_page_that_a_page_links_to_is_there():
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for path in paths:
        links = re.findall(r"\]\(([^)#:]+)\)|(?:src|srcset)=\"([^\":]+)\"", path.read_text())
        for link in ("".join(each) for each in links):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
