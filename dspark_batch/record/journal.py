"""The journal: one line for each finished item, and the only thing that means finished.

Every line carries a checksum over itself and the checksum of the line before, seeded by the run.
So a flipped byte, a lost line, a foreign one, or two journals in one file are all noticed. What a
crash leaves is a prefix, at worst with a torn last line, and every prefix is a valid journal.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias

import orjson

from dspark_batch.errors import JournalError
from dspark_batch.record.disk import AppendLog
from dspark_batch.record.row_index import RowIndex, key_of
from dspark_batch.record.rows import Row, columns_of
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
    row: Row  # our columns; the input columns stay in the input
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
        self._crc = _seed_crc(seed)
        self._unclaimed = RowIndex()
        if not read_only:
            path.touch(mode=0o644)
        self._end = self._recovered(path, seed)
        self._log = None if read_only else AppendLog(path, self._end, fsync_every=fsync_every)
        self._stream = path.open("rb")  # after the cut: its buffer must not know the torn bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes of the verified and appended rows."""
        return self._end if self._log is None else self._log.size

    def close(self) -> None:
        """Flush what fsync_every held back, and let go of the file."""
        self._stream.close()
        if self._log is not None:
            self._log.close()

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
        if entry.where != item.where or retries(columns_of(entry.row)):
            return None
        return Found(offset, errored=entry.row["status"] == "errored")

    def append(self, entry: Entry) -> int:
        """Commit one row, and return its offset.

        Raises:
            Resumable: the disk refused it; every row before it is safe.
        """
        if self._log is None:
            raise ValueError("the journal was opened to be read only")
        body = orjson.dumps(entry)[1:]
        crc = zlib.crc32(body, self._crc)
        line = b'{"crc":"%08x",%b\n' % (crc, body)
        offset = self._log.append(line)
        self._crc = crc
        return offset

    def read(self, offset: int) -> Entry:
        """Read the row at an offset that `append` or `claim` returned."""
        self._stream.seek(offset)
        return _entry(self._stream.readline())

    def _recovered(self, path: Path, seed: str) -> int:
        """Verify every line, and index the rows; return where the whole lines end."""
        end = 0
        with path.open("rb") as stream:
            for line in scan(stream, seed, str(path)):
                row = line.entry.row
                key = key_of(row["custom_id"], line.entry.digest, row["sample_index"])
                failed = row["status"] != "succeeded"
                self._unclaimed.add(key, line.entry.index, line.offset, failed=failed)
                end, self._crc = line.end, line.crc
        return end


def scan(stream: BufferedReader, seed: str, name: str) -> Iterator[Line]:
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
