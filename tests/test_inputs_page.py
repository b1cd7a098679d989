"""Every example of docs/inputs.md: the model sees of a record what the page says."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from dspark_batch.check import check, open_reading
from dspark_batch.cli.run_command import run_command, spec_of

PAGE = (Path(__file__).parents[1] / "docs" / "inputs.md").read_text()
BLOCK = re.compile(r"^```(json|sh|text)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def examples():
    """Yield (record, command, what is asked or said); a record may have several commands."""
    record = command = None
    for language, text in BLOCK.findall(PAGE):
        if language == "json":
            record = text
        elif language == "sh":
            command = text
        else:
            yield pytest.param(
                record, command, text, id=command.partition("out.jsonl ")[2] or record
            )


@cache
def reading(family):
    return open_reading(spec_in("dspark-batch run in.jsonl -o out.jsonl"))


def spec_in(command):
    program, name, *words = shlex.split(command)
    assert (program, name) == ("dspark-batch", "run")
    context = run_command.make_context("run", words)
    shown = ("quiet", "json_progress")
    return spec_of(context, {k: v for k, v in context.params.items() if k not in shown})


@pytest.mark.parametrize(("record", "command", "expected"), [*examples()])
def test_the_model_sees_of_a_record_what_the_page_says(
    tmp_path, monkeypatch, record, command, expected
):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(record + "\n")
    found = check(spec_in(command), open_reading=lambda spec: reading(spec.family))
    said = [example.text.removesuffix("\n") for example in found.examples] or found.first_failures
    assert said == [expected]


@pytest.mark.parametrize(
    "shape",
    [
        *("UltraChat", "TRL", "Alpaca", "OpenOrca", "Dolly", "OASST", "Tulu", "LLaMA-Factory"),
        *("xLAM", "MT-Bench"),
    ],
)
def test_every_shape_that_people_have_is_on_the_page(shape):
    assert f"**{shape}**" in PAGE
