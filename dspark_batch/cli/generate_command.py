"""`dspark-batch generate`: one prompt, and its answer while it is made."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspark_batch.cli.run_command import run_command, typed
from dspark_batch.errors import EqualityError, UsageError
from dspark_batch.spec.job_file import text_of
from dspark_batch.wording import count

if TYPE_CHECKING:
    from dspark_batch.generate import Piece
    from dspark_batch.types import Completion

_OF_RUN = (
    *("family", "target", "drafter", "target_bits", "drafter_bits", "trust_remote_code", "dtype"),
    *("system_prompt", "thinking", "special_tokens", "max_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "seed", "stop", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("bad_words", "min_tokens", "ignore_eos"),
    *("sampling", "draft_length", "lookup", "confidence_threshold"),
)
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@click.pass_context
def _generate(
    context: click.Context, /, *, prompt: str, compare: bool, accepted: bool, **choices: Any
) -> int:
    """Answer one prompt, and print the answer while it is made.

    The answer goes to standard output, as text; how many tokens a round committed, and how fast,
    to standard error. Nothing is kept. Files of prompts are for `run`, whose options these are.
    """
    options = typed(context, choices)
    if compare and options.get("sampling") == "rejection" and options.get("temperature", 0) > 0:
        raise UsageError(
            "--compare: by the rejection rule an answer depends on the drafts; use --sampling "
            "coupled."
        )
    # Heavy imports wait until there is work, so that --help answers at once.
    from dspark_batch.generate import OnePrompt

    asked = OnePrompt(text_of(prompt, Path()), **options)
    answer = _printed(asked.pieces(), colours=accepted)
    if accepted:
        _note(f"{click.style('green', fg='green')}: the drafter had proposed it")
    _note(_speed(answer))
    if compare:
        plain = asked.plainly()
        _note(f"without drafts: {_speed(plain)}")
        _refuse_difference(answer, plain)
        _note("both answers have the same tokens and the same bytes")
    return 0


generate_command = click.Command(
    "generate",
    callback=_generate,
    help=_generate.__doc__,
    params=[
        click.Option(
            ["--prompt"],
            metavar="TEXT",
            required=True,
            help="What to ask. @FILE reads it from a file.",
        ),
        click.Option(
            ["--compare"],
            is_flag=True,
            help="Decode it again without drafts; exit code 3 if the answers are not the same.",
        ),
        click.Option(["--accepted"], is_flag=True, help="Colour what the drafter had proposed."),
        *(each for each in run_command.params if each.name in _OF_RUN),
    ],
)


def _printed(pieces: Iterator["Piece"], *, colours: bool) -> "Completion":
    """Print an answer piece by piece; a terminal gets no control characters of it."""
    is_terminal = sys.stdout.isatty()
    while True:
        try:
            text, is_drafted = next(pieces)
        except StopIteration as over:
            click.echo()
            return over.value
        if is_terminal:
            text = text.translate(_CONTROL)
        click.echo(click.style(text, fg="green") if colours and is_drafted else text, nl=False)
        sys.stdout.flush()


def _speed(answer: "Completion") -> str:
    said = f"{count(len(answer.token_ids))} tokens"
    rounds = answer.accept_lengths
    if not rounds:
        return said
    in_rounds = sum(rounds)
    speed = f", {in_rounds / answer.decode_s:.1f} tokens/s" if answer.decode_s > 0 else ""
    return f"{said}, accept length {in_rounds / len(rounds):.2f}{speed}"


def _refuse_difference(answer: "Completion", plain: "Completion") -> None:
    ours, theirs = answer.token_ids, plain.token_ids
    if (ours, answer.text) == (theirs, plain.text):
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    raise EqualityError(
        f"the answer without drafts is another one from token {at} on. Please report this with "
        "the lines of `dspark-batch doctor`."
    )


def _note(sentence: str) -> None:
    click.echo(sentence, err=True)
