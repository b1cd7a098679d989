"""The door: parses words, runs the command, and turns what happens into an exit code."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import FrameType
from typing import TextIO

import click

from dspark_batch.cli.bench_command import bench_command
from dspark_batch.cli.calibrate_command import calibrate_command
from dspark_batch.cli.check_command import check_command
from dspark_batch.cli.diff_command import diff_command
from dspark_batch.cli.doctor_command import doctor_command
from dspark_batch.cli.export_command import export_command
from dspark_batch.cli.generate_command import generate_command
from dspark_batch.cli.merge_command import merge_command
from dspark_batch.cli.pairs_command import pairs_command
from dspark_batch.cli.report_command import report_command
from dspark_batch.cli.run_batch_command import run_batch_command
from dspark_batch.cli.run_command import run_command
from dspark_batch.cli.serve_command import serve_command
from dspark_batch.cli.show_command import show_command
from dspark_batch.cli.status_command import status_command
from dspark_batch.cli.train_drafter_command import train_drafter_command
from dspark_batch.cli.verify_command import verify_command
from dspark_batch.errors import DsparkBatchError, UsageError

# How mlx-lm and dflash-mlx call what has another name here; both names work.
_WORDS_OF_OTHERS = {
    "draft": "drafter",
    "draft-model": "drafter",
    "num-draft-tokens": "draft-length",
}
INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: closes generators and files on its way up, as Ctrl-C does."""


class _Commands(click.Group):
    """Commands by their names."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a file in its place is told which one takes files."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if "." in args[0]:  # no command has one
                said = f"No such command '{args[0]}'. Did you mean 'run {args[0]}'?"
            elif "Did you mean" in error.format_message():
                raise
            else:
                said = f"{error.message} `dspark-batch --help` lists them."
            raise click.UsageError(said, ctx) from error


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": lambda word: _WORDS_OF_OTHERS.get(word, word),
    },
)
@click.version_option(package_name="dspark-batch")
def cli() -> None:
    """Generate completions for files of prompts, offline, with speculative decoding on MLX."""


cli.add_command(run_command)
cli.add_command(run_batch_command)
cli.add_command(generate_command)
cli.add_command(serve_command)
cli.add_command(check_command)
cli.add_command(bench_command)
cli.add_command(status_command)
cli.add_command(verify_command)
cli.add_command(diff_command)
cli.add_command(merge_command)
cli.add_command(report_command)
cli.add_command(export_command)
cli.add_command(calibrate_command)
cli.add_command(show_command)
cli.add_command(train_drafter_command)
cli.add_command(pairs_command)
cli.add_command(doctor_command)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: the words after the program's name; None: those of this process.
    """
    words = list(sys.argv[1:] if args is None else args)
    _open_closed_streams()
    try:
        with _warnings_said(), _signals_raise():
            return _exit_code(words)
    finally:
        _let_go_of(sys.stdout)
        _let_go_of(sys.stderr)


def _let_go_of(stream: TextIO) -> None:
    """Flush; a reader that is gone (`| head`) or a full disk changes no exit code."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _exit_code(words: list[str]) -> int:
    try:
        return cli.main(words, prog_name="dspark-batch", standalone_mode=False) or 0
    except click.ClickException as error:
        _say(error.format_message())
        return error.exit_code
    except click.Abort as abort:  # click's name for KeyboardInterrupt
        _say(f"stopped{_how_to_continue(words)}")
        return TERMINATED if isinstance(abort.__cause__, Terminated) else INTERRUPTED
    except DsparkBatchError as error:
        _say(str(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001  the last door: all is shown, nothing swallowed
        if isinstance(error, ImportError) and (error.name or "").startswith("mlx"):
            _say(f"MLX does not load ({error}); `dspark-batch doctor` says what to install")
            return UsageError.exit_code
        traceback.print_exc()
        _say(
            f"an error of ours ({type(error).__name__}), please report it with the lines above"
            f"{_how_to_continue(words)}"
        )
        return DsparkBatchError.exit_code


class _Sayer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        kind = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        _say(f"{kind}{record.getMessage()}")


@contextmanager
def _warnings_said() -> Iterator[None]:
    """Show what the package logs: warnings, and what a server has to tell."""
    log, sayer = logging.getLogger("dspark_batch"), _Sayer()
    # In a new home it tells of its fonts and folders, which is no news for anybody.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    log.addHandler(sayer)
    try:
        yield
    finally:
        log.removeHandler(sayer)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into exceptions; a second one ends the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # A parent may have asked for deafness (nohup, `&` in a script): leave it so.
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_to_continue(words: Sequence[str]) -> str:
    without = " without --overwrite" if "--overwrite" in words else ""
    again = f"run the same command{without} to continue"
    if words[:1] == ["train-drafter"] and without:
        return "; without --overwrite the same command goes on with what is there"
    if words[:1] in (["verify"], ["train-drafter"]):
        return f"; {again}"
    if words[:1] not in (["run"], ["run-batch"]):
        return ""
    if _names_stdout(words):
        return "; the rows that were written are whole, and nothing else is kept"
    return f"; finished items are safe, {again}"


def _names_stdout(words: Sequence[str]) -> bool:
    pairs = {f"{option}={value}" for option, value in pairwise(words)} | set(words)
    return not pairs.isdisjoint({"-o-", "-o=-", "--out=-", "--output-file=-"})


def _say(sentence: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"dspark-batch: {sentence}\n")


def _open_closed_streams() -> None:
    """Lead closed streams nowhere; else the journal could become descriptor 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
