"""Inputs on the Hugging Face Hub, `hf://datasets/OWNER/NAME/PATH`: listed, then fetched once.

A fetched file stays in the run directory, so the next start needs no network and reads the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path

from dspark_batch.errors import UsageError

SCHEME = "hf://"

_OWNER_NAME_PATH = 4  # parts of the shortest name of a file, the word datasets included


def expand(name: str) -> list[str]:
    """List the files that a name or a pattern on the Hub means, in name order."""
    parts = name.removeprefix(SCHEME).split("/")
    if len(parts) < _OWNER_NAME_PATH or {"", ".", ".."} & set(parts):
        raise UsageError(
            f"{name}: expected a file, {SCHEME}datasets/OWNER/NAME/PATH; a whole data set is "
            f"{SCHEME}datasets/OWNER/NAME/**/*.parquet."
        )
    if not has_magic(name):
        return [name]
    from huggingface_hub import HfFileSystem

    with hub_errors(f"{name}: cannot be fetched from the Hub"):
        found = sorted(HfFileSystem().glob(name))
    if not found:
        raise UsageError(f"{name}: no file of the data set matches this pattern; check it.")
    return [SCHEME + path for path in found]


def place(name: str, folder: Path) -> Path:
    """Say where a file is kept that `fetch` gets."""
    return folder / name.removeprefix(SCHEME)


def fetch(name: str, path: Path) -> None:
    """Get a file, whole or not at all, unless it is there."""
    if path.exists():
        return
    from huggingface_hub import HfFileSystem

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    with hub_errors(f"{name}: cannot be fetched from the Hub"):
        HfFileSystem().get_file(name, str(draft))
    draft.replace(path)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into a sentence that begins with `what`."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"{what} ({reason}). Check the name and the network; a private data set needs "
            "`hf auth login`."
        ) from error
