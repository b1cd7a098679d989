"""Put what is finished on the Hugging Face Hub: an output as a data set, or a drafter."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import orjson

from dspark_batch.errors import UsageError
from dspark_batch.intake.hub import hub_errors
from dspark_batch.output.card import card
from dspark_batch.output.export import export
from dspark_batch.output.look import look
from dspark_batch.output.report import Report

_DATA = "data/train-00000-of-00001.parquet"


class Hub(Protocol):
    """The two verbs of `huggingface_hub.HfApi` that this takes."""

    def create_repo(
        self, repo_id: str, *, repo_type: str, private: bool | None, exist_ok: bool
    ) -> object:
        """Make a repository, unless it is there; give its address."""
        ...

    def upload_folder(
        self, *, repo_id: str, repo_type: str, folder_path: str, commit_message: str
    ) -> object:
        """Put all files of a folder there, in one commit."""
        ...


def push_to_hub(
    out: str,
    repo: str,
    columns: Sequence[str] = (),
    *,
    licence: str | None = None,
    private: bool = False,
    hub: Hub | None = None,
) -> str:
    """Upload a finished output, and return the address of the data set.

    Args:
        out: the output.
        repo: OWNER/NAME.
        columns: those to upload; (): all.
        licence: for the card; None: the card names none.
        private: make a new repository private.
        hub: where to; None: the Hub, as the user that is logged in.

    Raises:
        UsageError: the job is not finished, or the Hub refuses.
    """
    job = look(out)
    saved = job.run_dir.report()
    if saved is None:
        raise UsageError(f"{out} is not finished; its command continues it, then push it.")
    hub = hub or _the_hub()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, _DATA)
        rows.parent.mkdir()
        export(out, str(rows), columns)
        text = card(job, Report(**saved), _DATA, licence)
        Path(folder, "README.md").write_text(text, encoding="utf-8")
        # Paths of this machine stay here.
        numbers = saved | {"out": job.run_dir.out.name, "first_errors": []}
        report = orjson.dumps(numbers, option=orjson.OPT_INDENT_2)
        Path(folder, "report.json").write_bytes(report)
        with hub_errors(f"{repo}: cannot be written on the Hub"):
            made = hub.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
            hub.upload_folder(
                repo_id=repo,
                repo_type="dataset",
                folder_path=folder,
                commit_message=f"{saved['total']} rows by dspark-batch",
            )
    return str(made)


def push_drafter(folder: str, repo: str, *, private: bool = False, hub: Hub | None = None) -> str:
    """Upload a trained drafter with its card, and return the address of the model.

    Args:
        folder: that `train-drafter` made.
        repo: OWNER/NAME.
        private: make a new repository private.
        hub: where to; None: the Hub, as the user that is logged in.

    Raises:
        UsageError: the Hub refuses.
    """
    with hub_errors(f"{repo}: cannot be written on the Hub"):
        hub = hub or _the_hub()
        made = hub.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo,
            repo_type="model",
            folder_path=folder,
            commit_message="A drafter by dspark-batch",
        )
    return str(made)


def _the_hub() -> Hub:
    from huggingface_hub import HfApi

    return HfApi()
