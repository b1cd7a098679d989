"""Writes files so that a crash or a full disk costs nothing that was finished."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson

from dspark_batch.errors import Resumable


class AppendLog:
    """A file that only grows, by whole lines.

    Args:
        path: of the file; it is made if it is not there.
        size: bytes of its whole lines; what a crash has torn behind them goes.
        fsync_every: lines that a power cut may take.

    Attributes:
        size: bytes of all whole lines.
    """

    def __init__(self, path: Path, size: int, *, fsync_every: int = 1) -> None:
        self.size = size
        self._path = path
        self._fsync_every = fsync_every
        self._unsynced = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.ftruncate(self._fd, size)  # else the next line would be glued to a torn one

    def append(self, line: bytes) -> int:
        """Write a line, with its end, and return its offset.

        Raises:
            Resumable: the disk refused it; every line before it is safe.
        """
        offset, rest = self.size, memoryview(line)
        with full_disk_is_resumable(self._path):
            try:
                while rest:  # a nearly full disk takes a part
                    rest = rest[os.write(self._fd, rest) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._fd, offset)
                raise
        self.size = offset + len(line)
        self._unsynced += 1
        if self._unsynced >= self._fsync_every:
            self._sync()
        return offset

    def close(self) -> None:
        """Flush what fsync_every held back, and let go of the file."""
        try:
            self._sync()
        finally:
            os.close(self._fd)

    def _sync(self) -> None:
        if self._unsynced:
            with full_disk_is_resumable(self._path):
                os.fsync(self._fd)
        self._unsynced = 0


@contextmanager
def full_disk_is_resumable(path: Path) -> Iterator[None]:
    """Turn a disk that takes no more into the promise that the same command continues."""
    try:
        yield
    except OSError as error:
        raise Resumable(
            f"{path}: cannot be written ({error.strerror or error}). The finished rows are safe; "
            "make room for it and run the same command again."
        ) from error


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        Resumable: the disk refused it.
    """
    _write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    _write_bytes(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _write_bytes(path: Path, content: bytes) -> None:
    draft = path.with_name(path.name + ".tmp")
    with full_disk_is_resumable(path):
        draft.write_bytes(content)
        sync_file(draft)
        draft.replace(path)
        sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, and have them survive a power cut."""
    if not path.parent.exists():
        make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
