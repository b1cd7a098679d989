"""What an interrupted audit has replayed already: `audit.jsonl`, gone when the audit is whole."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Self

import orjson

from dspark_batch.audit.replay import Difference
from dspark_batch.record.disk import AppendLog
from dspark_batch.record.rows import Row
from dspark_batch.types import Item

_SAY_HOW = ("metrics", "verified")  # columns that tell how a row came, not what it answers


def row_digest(item: Item, row: Row) -> str:
    """Name what a row says: replayed once, it need not be replayed again."""
    said = {name: value for name, value in row.items() if name not in _SAY_HOW}
    return sha256(orjson.dumps([item.digest, item.sample_index, said])).hexdigest()


class AuditLog:
    """One line for each row that was replayed; a torn last line costs replaying it again.

    Args:
        path: of the file.
        subject: what was compared with what; lines about anything else do not count.
    """

    def __init__(self, path: Path, subject: Mapping[str, object]) -> None:
        self._path = path
        self._subject = sha256(orjson.dumps(subject, option=orjson.OPT_SORT_KEYS)).hexdigest()
        self._known: dict[str, Difference | None] = {}  # row digest -> what was found
        # Every line could be found again, so the disk need not have each one at once.
        self._log = AppendLog(path, self._read(), fsync_every=100)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._log.close()

    def __contains__(self, digest: str) -> bool:
        return digest in self._known

    def found(self, digest: str) -> Difference | None:
        """Tell what replaying a known row has shown; None: it was equal."""
        return self._known[digest]

    def add(self, digest: str, difference: Difference | None) -> None:
        """Keep what replaying a row has shown."""
        self._known[digest] = difference
        line = {"subject": self._subject, "row": digest, "difference": difference}
        self._log.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def discard(self) -> None:
        """Forget all: the audit is whole, and the next one begins anew."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> int:
        """Take in the lines of this subject; return where the whole lines end."""
        if not self._path.exists():
            return 0
        end = 0
        with self._path.open("rb") as lines:
            for raw in lines:
                try:
                    line = orjson.loads(raw)
                except orjson.JSONDecodeError:
                    return end
                if not raw.endswith(b"\n"):
                    return end
                end += len(raw)
                if line["subject"] == self._subject:
                    found = line["difference"]
                    self._known[line["row"]] = found and Difference(**found)
        return end
