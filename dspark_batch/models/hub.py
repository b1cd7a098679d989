"""Finds a checkpoint by its name: a directory, or a repository on the Hugging Face Hub."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from dspark_batch.errors import ModelError
from dspark_batch.models.checkpoint import check_files, first_line, read_config

_WEIGHTS = "model*.safetensors"
_FILES = ("*.json", _WEIGHTS, "tokenizer.model", "*.txt", "*.jinja")
_CODE = "*.py"  # fetched only where it may be run


class Checkpoint(NamedTuple):
    """Where a checkpoint lies, and what it is."""

    directory: Path
    source: str  # the directory as it was named, or ORG/NAME@COMMIT


class Download(NamedTuple):
    """How far the download of a checkpoint is."""

    name: str  # as the checkpoint was named
    done_bytes: int
    total_bytes: int  # of the files that were asked for so far


OnDownload = Callable[[Download], None]


def locate(
    name: str,
    *,
    with_code: bool = False,
    with_weights: bool = True,
    on_download: OnDownload | None = None,
) -> Checkpoint:
    """Return a checkpoint, downloading what the Hub's cache lacks.

    Args:
        name: a directory, ORG/NAME, or ORG/NAME@REVISION with a branch, tag or commit.
        with_code: fetch Python files too.
        with_weights: fetch the weights too.
        on_download: called from several threads while bytes come in, instead of the Hub's own
            progress bars.

    Raises:
        ModelError: neither a directory nor something that the Hub or its cache can give.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return Checkpoint(directory, name)
    if directory.is_absolute() or name.startswith("."):
        raise ModelError(f"{name}: no such directory. Name a checkpoint directory or a Hub id.")
    repo, _, revision = name.partition("@")
    patterns = [*_FILES, _CODE] if with_code else list(_FILES)
    try:
        found = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=patterns if with_weights else [p for p in patterns if p != _WEIGHTS],
            tqdm_class=_reporting_bar(name, on_download) if on_download else None,
        )
    except (HFValidationError, HTTPError, OSError) as error:
        raise ModelError(_why_not(name, error)) from error
    return Checkpoint(Path(found), f"{repo}@{Path(found).name}")


def cached(name: str) -> Checkpoint | None:
    """Find a checkpoint without a network; None: it is not here.

    Raises:
        ModelError: it is here, but not whole; the message names what is missing.
    """
    directory, found = Path(name).expanduser(), Checkpoint(Path(name).expanduser(), name)
    if not directory.is_dir():
        repo, _, revision = name.partition("@")
        try:
            path = snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=list(_FILES),
                local_files_only=True,
            )
        except (HFValidationError, LocalEntryNotFoundError) as error:
            if _is_partial(error):
                raise ModelError(f"{name}: {first_line(error)}") from error
            return None
        found = Checkpoint(Path(path), f"{repo}@{Path(path).name}")
    read_config(found.directory)
    check_files(found.directory)
    return found


def _is_partial(error: Exception) -> bool:
    """Whether the Hub's client knows that a checkpoint in its cache lacks files."""
    return getattr(error, "snapshot_path", None) is not None


def _why_not(name: str, error: Exception) -> str:
    """Say in one sentence why the Hub did not give a repository, and what to do."""
    repo, _, revision = name.partition("@")
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, HFValidationError):
        return f"{name}: neither a directory nor a Hub id, ORG/NAME ({first_line(error)})."
    if isinstance(error, GatedRepoError):
        return (
            f"{name}: a gated repository, and you are not logged in with an account that was let "
            f"in. Accept its terms on {page}, run `hf auth login`, then the same command again."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name}: no such directory here, and no such repository on the Hub, or it is private. "
            "Check the name; for a private one run `hf auth login` first."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{name}: the repository has no revision {revision!r}, expected one of its branches, "
            f"tags or commits; they are on {page}/commits."
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"{name}: the Hub does not know your token. Run `hf auth login`."
    part = "only in part" if _is_partial(error) else "not"
    offline = "HF_HUB_OFFLINE forbids to ask the Hub"
    unreachable = f"the Hub did not give it ({first_line(error).rstrip('.')})"
    return (
        f"{name}: {part} in the local cache {constants.HF_HUB_CACHE}, and "
        f"{offline if constants.HF_HUB_OFFLINE else unreachable}. Connect to the network and run "
        "the same command again, or name a local directory."
    )


def _reporting_bar(name: str, on_download: OnDownload) -> type[tqdm]:
    """Make the class of a progress bar that shows nothing and calls `on_download`."""
    most = 0  # bytes: one bar counts what comes in, another what was written

    class Reporting(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *args: object, **settings: object) -> None:
            super().__init__(*args, **settings | {"file": io.StringIO(), "mininterval": 0.5})

        def display(self, *args: object, **settings: object) -> None:
            nonlocal most
            if self.unit == "B" and self.n > most:  # others count files
                most = self.n
                on_download(Download(name, self.n, max(self.n, self.total or 0)))

    return Reporting
