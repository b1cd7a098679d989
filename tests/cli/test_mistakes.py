"""Mistakes that people make: each ends with exit code 2, and one sentence that helps."""

import importlib
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import refuse_to_open
from small_jobs import write_lines

from dspark_batch.cli.main import main

run_module = importlib.import_module("dspark_batch.run")

RUN = ["run", "in.jsonl", "-o", "out.jsonl"]
JOB = ["run", "job.toml"]
WHOLE_JOB = 'inputs = ["in.jsonl"]\nout = "out.jsonl"\n'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with inputs, where no model may be loaded."""
    monkeypatch.chdir(tmp_path)
    run = partial(run_module.run, open_engine=refuse_to_open)
    monkeypatch.setattr(run_module, "run", run)
    write_lines(tmp_path / "in.jsonl", {"question": "a", "topic": "b"})
    write_lines(tmp_path / "status.jsonl", {"prompt": "a", "status": "new"})
    write_lines(tmp_path / "good.jsonl", {"prompt": "a"})
    write_lines(tmp_path / "text.jsonl", b"prompt,a")
    write_lines(tmp_path / "array.jsonl", b'[{"prompt": "a"}]')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "in.txt").write_text("prompt\na\n")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    (tmp_path / "folder").mkdir()
    return tmp_path


def test_a_share_that_takes_the_input_for_its_value_is_told_how_to_write_it(capsys):
    assert main(["run", "--verify-greedy", "good.jsonl", "-o", "out.jsonl"]) == 2
    assert "'good.jsonl' is no share; write =1%, or put this behind INPUT." in (
        capsys.readouterr().err
    )


def said(words, capsys):
    """What a mistake is answered with, once the form is right."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [sentence] = err.removesuffix("\n").split("\n")
    assert sentence.startswith("dspark-batch: ")
    assert not sentence.endswith(" ")
    return sentence.removeprefix("dspark-batch: ")


@pytest.mark.parametrize(
    ("words", "helps"),
    [
        # commands and options
        (["rnu", "in.jsonl"], "No such command 'rnu'"),  # newer clicks suggest one
        ([*RUN, "--max-token", "5"], "--max-tokens"),
        ([*RUN, "--slot", "3"], "--slots"),
        (["run", "in.jsonl"], "Missing option '-o' / '--out'"),
        (["run", "-o", "out.jsonl"], "Missing argument 'INPUT...'"),
        ([*RUN, "--slots"], "Option '--slots' requires an argument"),
        (
            ["in.jsonl", "-o", "out.jsonl"],
            "No such command 'in.jsonl'. Did you mean 'run in.jsonl'?",
        ),
        (["help"], "No such command 'help'. `dspark-batch --help` lists them"),
        (["jobs/label.toml"], "Did you mean 'run jobs/label.toml'?"),
        # values
        ([*RUN, "--slots", "many"], "'many' is not a valid integer; give a number, or auto"),
        ([*RUN, "--temperature", "hot"], "'hot' is not a valid number"),
        ([*RUN, "--max-tokens", "many"], "'many' is not a valid integer"),
        ([*RUN, "--slots", "0"], "0 is not in the range 1<=x<=1024"),
        ([*RUN, "--temperature", "-1"], "-1.0 is not in the range x>=0"),
        ([*RUN, "--dtype", "fp16"], "is not one of 'float32', 'bfloat16', 'float16'"),
        ([*RUN, "--on-overflow", "cut"], "'error', 'skip', 'truncate-left', 'truncate-right'"),
        ([*RUN, "--deadline", "7am"], "expected a time of the day such as 07:00"),
        ([*RUN, "--max-runtime", "6"], "expected a duration such as 6h, 1h30m or 90s"),
        ([*RUN, "--stop", ""], "expected strings that are not empty"),
        ([*RUN, "--keep", "a", "--drop", "b"], "keep and drop exclude each other"),
        ([*RUN, "--overwrite", "--resume", "always"], "exclude each other; drop one of them"),
        ([*RUN, "--retry-where", "errored"], "expected COLUMN=VALUE, such as status=skipped"),
        ([*RUN, "--retry-where", "error_code=engine"], "did you mean error.code"),
        ([*RUN, "--retry-where", "status=failed"], "expected errored or skipped"),
        (
            [*RUN, "--retry-where", "finish_reason=length"],
            "export OUT again.jsonl --inputs --where finish_reason=length`, and run that file with",
        ),
        ([*RUN, "--retry-where", "status=succeeded"], "the same answers would come out"),
        # files
        (["run", "no.jsonl", "-o", "out.jsonl"], "no.jsonl: no such file; check the path"),
        (["run", "no*.jsonl", "-o", "out.jsonl"], "no file matches this pattern"),
        (["run", "folder", "-o", "out.jsonl"], "name its files, for example 'folder/*.jsonl'"),
        (["run", "in.txt", "-o", "out.jsonl"], "expected one of .jsonl, .json, .csv, .tsv, .parq"),
        (["run", "half.parquet", "-o", "out.jsonl"], "not a whole Parquet file"),
        (["run", "empty.jsonl", "-o", "out.jsonl"], "holds no records"),
        (["run", "in.jsonl", "-o", "out.csv"], "ends in .jsonl or .parquet; rename it"),
        (["run", "good.jsonl", "-o", "good.jsonl"], "choose another output"),
        (["run", "in.jsonl", "-o", "folder"], "expected an output that ends in"),
        (["show", "in.txt"], "expected an output, which ends in .jsonl or .parquet"),
        (["show", "half.parquet"], "not a whole Parquet file"),
        (["show", "text.jsonl"], "is a table of text and no JSON"),
        (["show", "array.jsonl"], "no output of ours (a line is no row)"),
        (["show", "out.jsonl"], "An output appears when its run is complete"),
        (["run", "job.yaml"], "job.yaml: job files are TOML; write its keys as `key = value`"),
        (["run", "Job.YML", "-o", "out.jsonl"], "job files are TOML"),
        ([*RUN, "--slots", "0"], "0 is not in the range 1<=x<=1024; give a number, or auto."),
        ([*RUN, "--slots", "-4"], "-4 is not in the range 1<=x<=1024; give a number, or auto."),
        ([*RUN, "--slots", "100000"], "100000 is not in the range 1<=x<=1024"),
        ([*RUN, "--slots", "2.5"], "'2.5' is not a valid integer; give a number, or auto."),
        (["run", "good.jsonl", "-o", "-", "--resume=always"], "-o - keeps nothing to resume"),
        # columns
        (RUN, "columns are `question`, `topic`; name the right one with --prompt-column"),
        ([*RUN, "--prompt-column", "Question"], "did you mean question"),
        (["run", "in.parquet", "-o", "out.jsonl"], "columns are `text`; name the right one"),
        (
            [*RUN, "--template", "{{ qestion }}"],
            "no record of in.jsonl has; did you mean question",
        ),
        ([*RUN, "--template", "{{ question"], "template, line 1: not Jinja"),
        ([*RUN, "--template", "@no.txt"], "check what follows the @"),
        ([*RUN, "--prompt-column", "question", "--keep", "topics"], "did you mean topic"),
        (["run", "status.jsonl", "-o", "out.jsonl"], "tell them apart with --output-prefix"),
        ([*RUN, "--prompt-column=question", "--output-column=usage"], "another of our columns"),
        ([*RUN, "--prompt-column=question", "--output-column=topic"], "which is one of ours"),
        # the OpenAI format
        (["run", "in.jsonl", "-o", "out.parquet", "--format=openai"], "to .jsonl only; rename it"),
        ([*RUN, "--format=openai", "--samples=2"], "one answer per request; use format rows"),
        (["run-batch", "-i", "in.jsonl"], "Missing option '-o' / '--output-file'"),
        # going on
        ([*RUN, "--prompt-column=question", "--resume=always"], "nothing to resume"),
        (["run", "no.toml"], "no.toml: cannot be read (No such file or directory)"),
        (["run", "good.jsonl", "x.toml", "-o", "out.jsonl"], "x.toml: no such file"),
    ],
)
def test_a_mistake_is_answered_with_one_sentence_that_helps(words, helps, capsys):
    assert helps in said(words, capsys)


@pytest.mark.parametrize(
    ("text", "helps"),
    [
        (WHOLE_JOB + "max_token = 5", "unknown key `max_token`; did you mean max_tokens"),
        (WHOLE_JOB + "max-tokens = 5", "unknown key `max-tokens`; did you mean max_tokens"),
        (WHOLE_JOB + "[options]\nslots = 5", "unknown key `options`"),
        (WHOLE_JOB + "[options]\nslots = 5", "Job files have no [sections]; leave out the heading"),
        (WHOLE_JOB + 'slots = "5"', 'slots is "5", expected a whole number or auto'),
        (WHOLE_JOB + 'sampling = "couple"', "did you mean coupled"),
        (WHOLE_JOB + "max_tokens = 0", "max_tokens is 0, expected 1 or more"),
        (WHOLE_JOB + 'stop = "END"', "expected a list of strings"),
        (WHOLE_JOB + "slots = ", "not TOML"),
        ('inputs = ["in.jsonl"]', 'no out; add `out = "…"`, or give -o'),
        ('out = "out.jsonl"', 'no inputs; add `inputs = ["…"]`'),
        ('inputs = ["in.jsonl"]\nout = "{today}.jsonl"', "the only placeholder is {date}"),
        (WHOLE_JOB.replace("in.jsonl", "gone.jsonl"), "gone.jsonl: no such file"),
    ],
)
def test_a_mistake_in_a_job_file_is_answered_with_one_sentence_that_helps(
    text, helps, here, capsys
):
    (here / "job.toml").write_text(text)
    assert helps in said(JOB, capsys)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_words(shell, monkeypatch, capsys):
    monkeypatch.setenv("_DSPARK_BATCH_COMPLETE", f"{shell}_source")
    if shell == "bash":
        monkeypatch.setattr("click.shell_completion.BashComplete._check_version", lambda *_: None)
    with pytest.raises(SystemExit):
        main([])
    assert "_DSPARK_BATCH_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("run --on-over", "--on-overflow"),
        ("run --thinking o", "off"),
        ("run --family t", "tiny"),
        ("run-batch --model t", "tiny"),
        ("exp", "export"),
    ],
)
def test_the_shell_completes_options_and_choices(words, completed, monkeypatch, capsys):
    monkeypatch.setenv("_DSPARK_BATCH_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", f"dspark-batch {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    with pytest.raises(SystemExit):
        main([])
    assert completed in capsys.readouterr().out.split("\n")


def test_an_unknown_family_is_refused_before_anything_is_made(here, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "run", run_module.run.func)  # loads for itself
    before = set(here.iterdir())
    assert main(["run", "good.jsonl", "-o", "new.jsonl", "--family", "qwen33"]) == 2
    assert "--family qwen33: unknown; known are gemma4, " in capsys.readouterr().err
    assert set(here.iterdir()) == before
