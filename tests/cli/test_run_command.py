"""`run` turns words into a spec, runs it, and says how it went."""

import importlib
import json
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

import pytest
from fakes import CONTEXT_LENGTH, FakeEngine, fake_render

from dspark_batch.cli.main import main
from dspark_batch.cli.run_command import run_command
from dspark_batch.opening import Opened
from dspark_batch.spec.spec import Spec

# They change no row and no file, so they are no fields of Spec.
ABOUT_THE_SCREEN = {"show", "quiet", "json_progress"}
MIXED = Path(__file__).parents[2] / "sample_inputs" / "mixed.jsonl"
run_module = importlib.import_module("dspark_batch.run")


@pytest.fixture
def fake_engine(monkeypatch):
    """Run with an engine that needs no model."""
    opened = Opened(FakeEngine(), fake_render, CONTEXT_LENGTH, {"dtype": "float32"})
    run = partial(run_module.run, open_engine=lambda spec, manifest: opened)
    monkeypatch.setattr(run_module, "run", run)


@pytest.fixture
def specs(monkeypatch):
    """Collect what would have run."""
    seen = []

    def run(spec, *, observe, stop):
        seen.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", run)
    return seen


def test_every_field_is_an_option_and_every_option_a_field():
    options = {parameter.name for parameter in run_command.params}
    assert options - ABOUT_THE_SCREEN == {field.name for field in fields(Spec)}


def test_options_left_out_are_the_defaults_of_the_spec(specs):
    main(["run", "a.jsonl", "b.parquet", "-o", "out.jsonl"])
    assert specs == [Spec(inputs=("a.jsonl", "b.parquet"), out="out.jsonl")]


def test_every_option_reaches_its_field(specs):
    words = {
        "family": "tiny",
        "target": "org/target",
        "drafter": "org/drafter",
        "target_bits": 8,
        "drafter_bits": 4,
        "dtype": "bfloat16",
        "system_prompt": "Be kind.",
        "prompt_column": "question",
        "messages_column": "chat",
        "output_prefix": "answer_",
        "max_tokens": 7,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "seed": 3,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "sampling": "rejection",
        "confidence_threshold": 0.5,
        "slots": 3,
        "draft_length": 0,
        "resume": "never",
        "limit": 5,
        "fsync_every": 9,
        "grace": 2.5,
        "template": "{{ question }}",
        "on_overflow": "skip",
        "thinking": "off",
        "samples": 2,
        "output_column": "answer",
        "deadline": "07:00",
        "max_runtime": "6h",
        "report_by": "kind",
        "max_mismatches": 2,
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in words.items()] + [
        "--stop=END",
        "--stop=\n\n",
        "--bad-words=no",
        "--ignore-eos",
        "--keep=a",
        "--keep=b",
        "--overwrite",
        "--retry-failed",
        "--retry-where=error.code=engine",
        "--retry-where=status=skipped",
        "--log-confidence",
        "--trust-remote-code",
    ]
    main(["run", "-", "-o", "out.jsonl", *options])
    [spec] = specs
    words |= {"stop": ("END", "\n\n"), "keep": ("a", "b")}
    words["retry_where"] = ("error.code=engine", "status=skipped")
    words |= {"bad_words": ("no",), "ignore_eos": True}
    words |= {"overwrite": True, "retry_failed": True, "log_confidence": True}
    words["trust_remote_code"] = True
    assert spec == Spec(inputs=("-",), out="out.jsonl", **words)
    unchanged = {f.name for f in fields(Spec) if f.default not in (MISSING, getattr(spec, f.name))}
    assert len(unchanged) == len(words)  # no word was the default by chance


def test_what_does_not_go_with_the_others_reaches_its_field(specs):
    main(["run", "-", "-o", "out.jsonl", "--drop=c"])
    main(["run", "-", "-o", "out.jsonl", "--lookup"])
    main(["run", "-", "-o", "out.jsonl", "--format=openai"])
    both = {"inputs": ("-",), "out": "out.jsonl"}
    choices = [{"drop": ("c",)}, {"lookup": True}, {"format": "openai"}]
    assert specs == [Spec(**both, **each) for each in choices]


JOB = """
inputs = ["in.jsonl"]
out = "out.jsonl"
max_tokens = 7
slots = 3
"""


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def test_a_job_file_stands_between_options_and_defaults(specs, job):
    main(["run", str(job), "--slots", "1"])
    [spec] = specs
    assert (spec.max_tokens, spec.slots, spec.fsync_every) == (7, 1, 1)
    assert spec.inputs == (f"{job.parent}/in.jsonl",)


def test_inputs_and_output_of_a_job_file_can_be_replaced(specs, job):
    main(["run", str(job), "a.jsonl", "b.jsonl", "-o", "other.jsonl"])
    [spec] = specs
    assert (spec.inputs, spec.out) == (("a.jsonl", "b.jsonl"), "other.jsonl")


def test_what_answers_look_like_reaches_its_field(specs, tmp_path):
    (tmp_path / "s.json").write_text('{"type": "integer"}\n')
    (tmp_path / "g.lark").write_text('start: "a"\n')
    words = [f"--json-schema={tmp_path}/s.json", f"--grammar={tmp_path}/g.lark", "--regex=a+"]
    for word in (*words, "--choice=a"):
        main(["run", "-", "-o", "out.jsonl", word])
    assert [(s.json_schema, s.grammar, s.regex, s.choice) for s in specs] == [
        ('{"type": "integer"}', None, None, ()),
        (None, 'start: "a"', None, ()),
        (None, None, "a+", ()),
        (None, None, None, ("a",)),
    ]


def test_a_job_file_names_the_file_of_a_schema(specs, job):
    (job.parent / "s.json").write_text('{"type": "integer"}')
    job.write_text(JOB + 'json_schema = "s.json"\n')
    main(["run", str(job)])
    assert specs[0].json_schema == '{"type": "integer"}'


def test_a_template_can_come_from_a_file(specs, tmp_path):
    (tmp_path / "t.txt").write_text("{{ x }}")
    main(["run", "-", "-o", "out.jsonl", f"--template=@{tmp_path}/t.txt"])
    assert specs[0].template == "{{ x }}"


def test_a_system_prompt_can_come_from_a_file(specs, tmp_path):
    (tmp_path / "s.txt").write_text("Answer\nin one word.\n")
    (tmp_path / "job.toml").write_text(
        'system_prompt = "@s.txt"\ninputs = ["a.jsonl"]\nout = "o.jsonl"'
    )
    main(["run", "-", "-o", "out.jsonl", f"--system-prompt=@{tmp_path}/s.txt"])
    main(["run", "-", "-o", "out.jsonl", "--system-prompt=@@home"])
    main(["run", str(tmp_path / "job.toml")])
    assert [spec.system_prompt for spec in specs] == [
        *("Answer\nin one word.", "@home", "Answer\nin one word.")
    ]


def test_fields_to_ignore_are_a_list_in_any_spelling(specs):
    main(["run", "-", "-o", "out.jsonl", "--ignore-fields=tools, n", "--ignore-fields=user"])
    assert specs[0].ignore_fields == ("tools", "n", "user")


@pytest.fixture
def words(fake_engine, tmp_path):
    return ["run", str(MIXED), "-o", str(tmp_path / "out.jsonl")]


def test_a_run_ends_with_1_and_tells_what_failed(words, capsys):
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out.startswith("6 of 14 items have an answer.\n")
    assert "8 bad_record" in out
    assert "mixed.jsonl:6: not JSON" in out
    assert "and 5 more" in out
    assert err.splitlines()[0] == "dspark-batch: loading the models"
    assert err.splitlines()[-1].startswith("dspark-batch: 14/14 items")


def test_a_run_loses_no_line_of_a_bad_input(words, tmp_path):
    main(words)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    answered = [row["custom_id"] for row in rows if row["status"] == "succeeded"]
    assert answered == ["good-1", "good-2", "17", "#3", "not-a-number", "good-3"]
    assert len(rows) == 14  # a blank line is no record


def test_a_run_that_is_over_has_nothing_to_do_again(words, capsys):
    main(words)
    capsys.readouterr()
    assert main(words) == 1  # the failure rows are still there
    out, err = capsys.readouterr()
    assert out.startswith("Nothing to do: all 14 rows were there already.\n")
    assert err == ""


def test_progress_can_be_objects_for_a_program(words, capsys):
    assert main([*words, "--json-progress"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert json.loads(lines[0])["stage"] == "load"
    assert json.loads(lines[-1])["done"] == 14


def test_a_run_can_be_quiet(words, capsys):
    assert main([*words, "--quiet"]) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("fake_engine")
def test_a_run_warns_when_the_input_has_changed(tmp_path, capsys):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "one"}\n')
    main(["run", str(prompts), "-o", str(out)])
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    capsys.readouterr()
    assert main(["run", str(prompts), "-o", str(out), "-q"]) == 0
    assert capsys.readouterr().err == (
        "dspark-batch: warning: the input is not what it was at the first start: "
        "1 of 2 records have a row already\n"
    )
