"""The journal: one line for each finished item, and the only thing that means finished.

Every line carries a checksum over itself and the checksum of the line before, seeded by the run.
So a flipped byte, a lost line, a foreign one, or two journals in one file are all noticed. What a
crash leaves is a prefix, at worst with a torn last line, and every prefix is a valid journal.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self, TypeAlias

import orjson

from dspark_batch.errors import JournalError, Resumable
from dspark_batch.record.row_index import RowIndex, key_of
from dspark_batch.types import Item, Json

Retries: TypeAlias = Callable[[Mapping[str, Json]], bool]  # a failure -> whether to run it again

_HEAD = len('{"crc":"')
_BODY = len('{"crc":"00000000",')


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: what was answered, and which record it answers."""

    index: int  # position among all records when it was written
    where: str  # the record's file and line at that time
    digest: str  # of the record
    row: dict[str, Json]  # our columns; the input columns stay in the input
    finished_at: float | None = None  # Unix time in s; the output never has it; None: unknown


class Line(NamedTuple):
    """An entry and its place in the file."""

    offset: int  # of its first byte
    end: int  # just after its newline
    crc: int
    entry: Entry


class Found(NamedTuple):
    """A row that an earlier start left."""

    offset: int
    errored: bool


class Journal:
    """The rows of one run: verified and cut to its whole lines when opened, then appended to."""

    def __init__(
        self, path: Path, seed: str, *, fsync_every: int = 1, read_only: bool = False
    ) -> None:
        """Open or create.

        Args:
            path: of the file.
            seed: names the run; a journal that was begun with another seed is refused.
            fsync_every: rows that a power cut may take.
            read_only: change nothing, not even a torn tail: another process may be writing it.
        """
        self._path = path
        self._fsync_every = fsync_every
        self._unsynced = 0
        self._end, self._crc = 0, _seed_crc(seed)
        self._unclaimed = RowIndex()
        mode = os.O_RDONLY if read_only else os.O_RDWR | os.O_APPEND | os.O_CREAT
        self._fd = os.open(path, mode, 0o644)
        try:
            self._recover(seed)
            if not read_only:  # else the next line would be glued to a torn one
                os.ftruncate(self._fd, self._end)
        except BaseException:
            os.close(self._fd)
            raise
        self._stream = path.open("rb")  # after the cut: its buffer must not know the torn bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes of the verified and appended rows."""
        return self._end

    def close(self) -> None:
        """Flush what fsync_every held back, and let go of the file."""
        self._stream.close()
        try:
            self._sync()
        finally:
            os.close(self._fd)

    def claim(self, item: Item, retries: Retries) -> Found | None:
        """Take a finished row of this very record, at most once; None: it has to run.

        The key is what the noise of an item is drawn from too. Items that share it are
        interchangeable, and each takes a row of its own; position alone never matches. A failure
        names a place, so it stays only in its place.
        """
        rows, key = self._unclaimed, key_of(item.custom_id, item.digest, item.sample_index)
        row = rows.own(key, item.index)
        if row is not None and rows.is_failure(row):
            return self._kept(row, item, retries)
        row = rows.other(key) if row is None else row
        if row is None:
            return None
        rows.take(row)
        return Found(rows.offset(row), errored=False)

    def _kept(self, row: int, item: Item, retries: Retries) -> Found | None:
        """Take a failure, if it stays what it is."""
        self._unclaimed.take(row)
        offset = self._unclaimed.offset(row)
        entry = self.read(offset)
        if entry.where != item.where or retries(entry.row):
            return None
        return Found(offset, errored=entry.row["status"] == "errored")

    def append(self, entry: Entry) -> int:
        """Commit one row, and return its offset.

        Raises:
            Resumable: the disk refused it; every row before it is safe.
        """
        body = orjson.dumps(entry)[1:]
        crc = zlib.crc32(body, self._crc)
        line = b'{"crc":"%08x",%b\n' % (crc, body)
        offset = self._end
        self._write(line)
        self._end, self._crc = offset + len(line), crc
        self._unsynced += 1
        if self._unsynced >= self._fsync_every:
            self._sync()
        return offset

    def read(self, offset: int) -> Entry:
        """Read the row at an offset that `append` or `claim` returned."""
        self._stream.seek(offset)
        return _entry(self._stream.readline())

    def _recover(self, seed: str) -> None:
        """Verify every line, and index the rows."""
        with self._path.open("rb") as stream:
            for line in scan(stream, seed, str(self._path)):
                row = line.entry.row
                key = key_of(row["custom_id"], line.entry.digest, row["sample_index"])
                failed = row["status"] != "succeeded"
                self._unclaimed.add(key, line.entry.index, line.offset, failed=failed)
                self._end, self._crc = line.end, line.crc

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:  # a nearly full disk takes a part
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise self._refused(error) from error

    def _sync(self) -> None:
        if self._unsynced:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise self._refused(error) from error
        self._unsynced = 0

    def _refused(self, error: OSError) -> Resumable:
        return Resumable(
            f"{self._path}: cannot be written ({error.strerror}). The finished rows are safe; "
            "make room for it and run the same command again."
        )


def scan(stream: BinaryIO, seed: str, name: str) -> Iterator[Line]:
    """Yield every whole line from the start of a journal, verified; stop at a torn tail.

    Raises:
        JournalError: a line that no crash of ours can have left.
    """
    crc, offset = _seed_crc(seed), 0
    for number, raw in enumerate(stream, 1):
        if not raw.endswith(b"\n"):
            return
        crc = zlib.crc32(raw[_BODY:-1], crc)
        if raw[:_BODY] != b'{"crc":"%08x",' % crc:
            if b"\0" in raw and not stream.peek(1):
                return  # a power cut can leave NULs, but only at the end
            raise JournalError(
                f"{name}:{number}: not the row that this run wrote here (its checksum is "
                f"{raw[_HEAD : _BODY - 2]!r}, expected {b'%08x' % crc!r}). Restore the file from a "
                "copy, or delete this line and all below it to generate those items again."
            )
        yield Line(offset, offset + len(raw), crc, _entry(raw))
        offset += len(raw)


def _entry(raw: bytes) -> Entry:
    fields = orjson.loads(raw)
    del fields["crc"]
    return Entry(**fields)


def _seed_crc(seed: str) -> int:
    return zlib.crc32(seed.encode())
