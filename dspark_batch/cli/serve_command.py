"""`dspark-batch serve`: an OpenAI-compatible server; the options of answers are `run`'s."""

import logging
import os
from pathlib import Path

import click

from dspark_batch.cli.numbers import Number, Whole
from dspark_batch.cli.run_command import run_command, typed
from dspark_batch.errors import UsageError
from dspark_batch.spec.budget import seconds_of
from dspark_batch.spec.spec import Spec

_KEYS = "DSPARK_BATCH_API_KEY"
_OF_RUN = (
    *("family", "target", "drafter", "target_bits", "drafter_bits", "trust_remote_code", "dtype"),
    *("system_prompt", "thinking", "special_tokens", "ignore_fields", "last_assistant"),
    *("on_overflow", "max_tokens", "temperature", "top_p", "top_k", "min_p", "sampling", "slots"),
    *("draft_length", "lookup", "no_prefix_cache", "confidence_threshold", "fsync_every", "grace"),
)
_MEGA = 1 << 20


@click.pass_context
def _serve(  # noqa: PLR0913  each is an option
    context: click.Context,
    /,
    *,
    host: str,
    port: int,
    data_dir: str,
    served_model_name: tuple[str, ...],
    api_key_file: str | None,
    no_auth: bool,
    cors_origin: tuple[str, ...],
    live_slots: int | None,
    max_waiting: int | None,
    max_body: int,
    request_timeout: float | None,
    max_batch_requests: int,
    retain: str | None,
    **choices: object,
) -> int:
    """Serve a model to OpenAI clients: chats, completions, files and batches.

    Clients need the base URL http://127.0.0.1:8000/v1. Live requests go before batches. A batch
    survives the server: start the same command again, and it goes on. Other machines need --host
    and a key, from --api-key-file or from DSPARK_BATCH_API_KEY.
    """
    try:
        # Heavy imports wait until there is work, so that --help answers at once.
        from dspark_batch.serve.server import Server
        from dspark_batch.serve.service import Service
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install 'dspark-batch[serve]'.") from error
    spec = Spec(inputs=("live",), out="-", **typed(context, choices))
    service = Service(
        spec=spec,
        data_dir=Path(data_dir),
        host=host,
        port=port,
        names=served_model_name,
        keys=_keys(api_key_file),
        no_auth=no_auth,
        cors_origins=cors_origin,
        live_slots=live_slots,
        max_waiting=max_waiting,
        max_body=max_body * _MEGA,
        request_timeout=request_timeout,
        max_batch_requests=max_batch_requests,
        retain_s=None if retain is None else _seconds_of(retain),
    )

    def ready(url: str) -> None:
        names = ", ".join(service.model_names)
        click.echo(f"{names} at {url}/v1, data in {service.data_dir}; Ctrl-C stops.", err=True)

    logging.getLogger("dspark_batch.serve").setLevel(logging.INFO)
    Server(service).run(ready)
    return 0


def _keys(path: str | None) -> tuple[str, ...]:
    """Read the keys: one a line in a file, or apart by commas in the environment."""
    if path is None:
        return tuple(key.strip() for key in os.environ.get(_KEYS, "").split(",") if key.strip())
    try:
        keys = tuple(filter(None, map(str.strip, Path(path).read_text().splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path}: cannot be read ({error}).") from error
    if not keys:
        raise UsageError(f"--api-key-file {path}: has no key; write one into it.")
    return keys


def _seconds_of(text: str) -> float:
    try:
        return seconds_of(text)
    except UsageError as error:
        raise UsageError(f"--retain {text}: expected a duration such as 30d or 12h.") from error


serve_command = click.Command(
    "serve",
    callback=_serve,
    help=_serve.__doc__,
    params=[
        click.Option(
            ["--host"], default="127.0.0.1", show_default=True, help="Listen at this address."
        ),
        click.Option(
            ["--port"],
            type=Whole(min=0, max=65535),
            default=8000,
            show_default=True,
            help="Listen at this port; 0: any that is free.",
        ),
        click.Option(
            ["--data-dir"],
            metavar="FOLDER",
            default="dspark-batch-data",
            show_default=True,
            help="Keep files and batches here.",
        ),
        click.Option(
            ["--served-model-name"],
            metavar="NAME",
            multiple=True,
            help="A name of the model for clients; repeatable: answers carry the first, requests "
            "may use each.  [default: as the pair is named]",
        ),
        click.Option(
            ["--api-key-file"],
            metavar="FILE",
            help="Refuse requests without one of the keys in this file, one a line.",
        ),
        click.Option(
            ["--no-auth"], is_flag=True, help="Let other machines send requests without a key."
        ),
        click.Option(
            ["--cors-origin"],
            metavar="ORIGIN",
            multiple=True,
            help="Let web pages of this origin send requests, http://HOST:PORT; repeatable.",
        ),
        click.Option(
            ["--live-slots"],
            metavar="N",
            type=Whole(min=0),
            help="Slots that batches leave free while live requests come.  "
            "[default: an eighth, at least 1]",
        ),
        click.Option(
            ["--max-waiting"],
            metavar="N",
            type=Whole(min=0),
            help="Most live requests that wait for a slot; more get status 429.  "
            "[default: 4 for each slot]",
        ),
        click.Option(
            ["--max-body"],
            metavar="MB",
            type=Whole(min=1),
            default=32,
            show_default=True,
            help="Most megabytes of a live request.",
        ),
        click.Option(
            ["--request-timeout"],
            metavar="S",
            type=Number(min=0, min_open=True),
            help="End a live request with status 408 after these seconds.  [default: never]",
        ),
        click.Option(
            ["--max-batch-requests"],
            metavar="N",
            type=Whole(min=1),
            default=50_000,
            show_default=True,
            help="Most requests of a batch.",
        ),
        click.Option(
            ["--retain"],
            metavar="TIME",
            help="At the start, delete files and ended batches that are older: 30d, 12h.",
        ),
        *(each for each in run_command.params if each.name in _OF_RUN),
    ],
)
