"""Whatever happens ends in the right exit code, and a sentence that helps."""

import importlib
import os
import resource
import signal
import subprocess
import sys

import pytest

import dspark_batch.errors
from dspark_batch.cli.main import main
from dspark_batch.errors import DsparkBatchError

RUN = ["run", "in.jsonl", "-o", "out.parquet"]
ERRORS = [
    error
    for error in vars(dspark_batch.errors).values()
    if isinstance(error, type) and issubclass(error, DsparkBatchError)
]


@pytest.fixture
def run_raises(monkeypatch):
    """Make the run end with an exception."""

    def set_error(error):
        def run(spec, **_):
            raise error

        monkeypatch.setattr(importlib.import_module("dspark_batch.run"), "run", run)

    return set_error


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_the_tree_is_one_sentence_and_its_exit_code(error, run_raises, capsys):
    run_raises(error("in.jsonl is gone. Put it back."))
    assert main(RUN) == error.exit_code
    assert capsys.readouterr().err == "dspark-batch: in.jsonl is gone. Put it back.\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "-o", "out.parquet"], "Missing argument 'INPUT...'"),
        (["run", "in.jsonl"], "Missing option '-o'"),
        ([*RUN, "--slot", "3"], "--slots"),
        ([*RUN, "--slots", "0"], "0 is not in the range 1<=x<=1024"),
        ([*RUN, "--draft-length", "-1"], "-1 is not in the range x>=0"),
        ([*RUN, "--max-tokens", "many"], "'many' is not a valid integer"),
        ([*RUN, "--resume", "perhaps"], "'if-possible', 'always', 'never'"),
        (["rum"], "rum"),
    ],
)
def test_a_wrong_word_is_exit_code_2_and_named(words, says, capsys):
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_what_is_safe(run_raises, capsys):
    run_raises(KeyError("slot"))
    assert main(RUN) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1] == (
        "dspark-batch: an error of ours (KeyError), please report it with the lines above; "
        "finished items are safe, run the same command to continue"
    )


def test_a_machine_without_mlx_is_sent_to_the_doctor(run_raises, capsys):
    run_raises(ModuleNotFoundError("No module named 'mlx'", name="mlx"))
    assert main(RUN) == 2
    assert capsys.readouterr().err == (
        "dspark-batch: MLX does not load (No module named 'mlx'); "
        "`dspark-batch doctor` says what to install\n"
    )


def test_the_advice_after_a_stop_does_not_throw_the_rows_away(run_raises, capsys):
    run_raises(KeyboardInterrupt())
    assert main([*RUN, "--overwrite"]) == 130
    assert "without --overwrite" in capsys.readouterr().err


def test_signal_handlers_are_left_as_they_were(run_raises):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run_raises(KeyboardInterrupt())
    main(RUN)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


SLEEPS = """
import importlib, sys, time
from dspark_batch.cli.main import main

def items():
    try:
        print("ready", flush=True)
        time.sleep(60)
        yield
    finally:
        print("closed", flush=True)

def run(spec, **_):
    for _ in items():
        pass

importlib.import_module("dspark_batch.run").run = run
sys.exit(main(["run", "in.jsonl", "-o", "out.parquet"]))
"""


@pytest.fixture
def sleeper():
    """A run in its own process, in the middle of an item."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_a_signal_closes_what_is_open_and_says_how_to_continue(sleeper, number, code):
    sleeper.send_signal(number)
    out, err = sleeper.communicate(timeout=100)
    assert sleeper.returncode == code
    assert out == "closed\n"
    assert err.strip() == (
        "dspark-batch: stopped; finished items are safe, run the same command to continue"
    )


PRINTS = """
import importlib, sys
from types import SimpleNamespace
from dspark_batch.cli import summary
from dspark_batch.cli.main import main

summary.summary = lambda report: "the summary"
importlib.import_module("dspark_batch.run").run = lambda spec, **_: SimpleNamespace(exit_code=0)
importlib.import_module("dspark_batch.report").write_report = lambda out: "report.html"
sys.exit(main(["run", "in.jsonl", "-o", "out.parquet"]))
"""


def test_the_summary_comes_before_the_page_is_drawn():
    slow = PRINTS.replace(
        "write_report = lambda out:", "write_report = lambda out: print('drawing', flush=True) or"
    )
    done = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True)
    assert done.stdout == "the summary\ndrawing\n  report        report.html\n"


def test_a_reader_of_the_summary_that_is_gone_changes_no_exit_code():
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS],
        env=buffered,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()  # as `| head` does
    assert process.stderr.read() == ""
    assert process.wait(timeout=100) == 0
    process.stderr.close()


def test_a_run_without_open_streams_ends_as_any_other():
    command = 'exec "$0" -c "$1" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, PRINTS], timeout=100)
    assert done.returncode == 0


def test_help_answers_at_once():
    command = [sys.executable, "-m", "dspark_batch", "run", "--help"]
    subprocess.run(command, capture_output=True, check=True)  # writes the byte code
    before = processor_s()
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert processor_s() - before < 1.5  # 0.2 s; the bound is for a slow machine
    assert "--max-tokens" in done.stdout


def processor_s():
    """What our children had of the processors, however busy these are."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_library_that_draws_says_nothing_of_its_fonts_and_folders(tmp_path):
    """Where a home cannot be written, matplotlib would advise to set a variable of its own."""
    (tmp_path / "home").touch()
    others = {k: v for k, v in os.environ.items() if not k.startswith(("MPL", "XDG"))}
    program = "from dspark_batch.cli.main import main; main(['--version'])\n"
    program += "import dspark_batch.page.charts"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=others | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
