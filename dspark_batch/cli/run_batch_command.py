"""`dspark-batch run-batch`: the words of `vllm run-batch` for a run in OpenAI's format."""

from typing import Any

import click

from dspark_batch.cli.run_command import families, run_command, run_spec, typed
from dspark_batch.spec.spec import Spec

_SAID_OTHERWISE = ("inputs", "out", "format", "family", "target")
_ABOUT_ROWS = ("samples", "keep", "drop", "output_column", "output_prefix")


@click.pass_context
def _run_batch(  # noqa: PLR0913  each is an option
    context: click.Context,
    /,
    *,
    show: int,
    quiet: bool,
    json_progress: bool,
    input_file: tuple[str, ...],
    output_file: str,
    model: str | None,
    **choices: Any,
) -> int:
    """Answer the OpenAI Batch requests of a file, one response line for each.

    The same as `run INPUT -o OUTPUT --format openai`, for scripts that call `vllm run-batch`.
    """
    fields = typed(context, choices)
    if model is not None:
        fields["target" if "/" in model else "family"] = model
    spec = Spec(inputs=input_file, out=output_file, format="openai", **fields)
    return run_spec(spec, quiet=quiet, json_progress=json_progress, num_shown=show)


run_batch_command = click.Command(
    "run-batch",
    callback=_run_batch,
    help=_run_batch.__doc__,
    params=[
        click.Option(
            ["-i", "--input-file"],
            metavar="INPUT",
            required=True,
            multiple=True,
            type=click.Path(),
            help="Requests, one line each; repeatable.",
        ),
        click.Option(
            ["-o", "--output-file"],
            metavar="OUTPUT",
            required=True,
            type=click.Path(),
            help="Write response lines to this file: *.jsonl.",
        ),
        click.Option(
            ["--model"],
            metavar="MODEL",
            help="A registered pair, or, with a / in it, a target: a directory or Hub id.  "
            "[default: tiny]",
            shell_complete=families,
        ),
        *(each for each in run_command.params if each.name not in _SAID_OTHERWISE + _ABOUT_ROWS),
    ],
)
