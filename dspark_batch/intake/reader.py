"""Stream records out of files; each becomes an Item or a Failure, and none is lost.

What a file is and how its records become JSON is `intake/files.py`'s to know. The output takes the
columns of a table from its Arrow data, so only `Item.record` says a value as JSON has to.
"""

import hashlib
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import compress
from pathlib import Path
from typing import BinaryIO

import orjson
import pyarrow as pa

from dspark_batch.errors import UsageError
from dspark_batch.intake import files, hub, remote
from dspark_batch.intake.files import EVERY, Raw, Source, Wanted, count_records, printable
from dspark_batch.intake.json_text import is_text, parse
from dspark_batch.intake.values import taken
from dspark_batch.types import Failure, Item, Json

__all__ = ["Source", "count_records", "printable"]

STDIN = "-"
STDIN_NAME = "<stdin>"
ALL = range(sys.maxsize)  # records


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring records of one file, few enough to hold in memory."""

    records: tuple[Item | Failure, ...]
    batch: pa.RecordBatch | None = None  # the same records with their types; None: no table

    def only(self, keep: Sequence[bool]) -> "Chunk":
        """Select records."""
        return self if all(keep) else self.at(list(compress(range(len(keep)), keep)))

    def at(self, places: Sequence[int]) -> "Chunk":
        """Select records by their places, one as often as it is named."""
        batch = None if self.batch is None else taken(self.batch, places)
        return Chunk(tuple(self.records[place] for place in places), batch)


def locate(
    inputs: Iterable[str],
    stdin: Path,
    fetched: Path = Path("fetched"),
    wanted: Wanted = EVERY,
) -> tuple[Source, ...]:
    """Resolve paths, globs (in name order) and `-`, and refuse what cannot be an input.

    Args:
        inputs: as typed.
        stdin: where `spool` puts standard input.
        fetched: the folder where `fetch` puts files that are elsewhere.
        wanted: what the job wants of their columns.
    """
    sources: list[Source] = []
    for name in inputs:
        if name == STDIN:
            sources.append(Source(STDIN_NAME, stdin, wanted))
        elif name.startswith(hub.SCHEME):
            sources += [
                Source(each, hub.place(each, fetched), wanted, each) for each in hub.expand(name)
            ]
        elif remote.is_url(name):
            sources += [
                Source(remote.shown(each), remote.place(each, fetched), wanted, each)
                for each in remote.expand(name)
            ]
        else:
            paths = _expand(name)
            sources += [_checked(Source(printable(path), Path(path), wanted)) for path in paths]
    return tuple(sources)


def spool(stream: BinaryIO, path: Path) -> str:
    """Copy standard input to a file, because a job reads its input more than once.

    Returns:
        The SHA-256 of what was copied.
    """
    with path.open("w+b") as file:
        shutil.copyfileobj(stream, file)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(sources: Iterable[Source]) -> None:
    """Get the files that are not here yet, and refuse what cannot be read."""
    for source in sources:
        if source.url is not None:
            fetch_one = hub.fetch if source.url.startswith(hub.SCHEME) else remote.fetch
            fetch_one(source.url, source.path)
            files.check(source)


def read(
    sources: Iterable[Source], part: range = ALL, samples: int = 1
) -> Iterator[Item | Failure]:
    """Yield a part of the records of all sources, in order.

    Each comes `samples` times, one after the other.
    """
    for chunk in read_chunks(sources, part, samples):
        yield from chunk.records


def read_chunks(sources: Iterable[Source], part: range = ALL, samples: int = 1) -> Iterator[Chunk]:
    """Yield what `read` yields, chunk by chunk, with the Arrow data of tables."""
    end = 0
    for source in sources:
        for raws, batch in files.raw_chunks(source):
            begin, end = end, end + len(raws)
            if begin >= part.stop:
                return
            own = range(max(begin, part.start), min(end, part.stop))
            if not own:
                continue
            records = tuple(_record_of(i, source, raws[i - begin]) for i in own)
            slice_ = batch and batch.slice(own.start - begin, len(own))
            yield _repeated(Chunk(records, slice_), samples)


def records_of_table(table: pa.Table, wanted: Wanted) -> Iterator[Item | Failure]:
    """Read the rows of a table in memory as those of a file."""
    source, index = Source("row", Path(), wanted), 0
    for batch in table.to_batches():
        for raw in files.raws_of(batch, wanted, index + 1):
            yield _record_of(index, source, raw)
            index += 1


def item_of(record: Item | Failure) -> Item:
    """Name what was read, whether or not it can be asked."""
    return record.item if isinstance(record, Failure) else record


def digest_of(line: bytes) -> str:
    """Name a record by its bytes: 128 bits of SHA-256, in hex."""
    return hashlib.sha256(line).hexdigest()[:32]


def _repeated(chunk: Chunk, samples: int) -> Chunk:
    """Put every record there `samples` times, as items of their own."""
    if samples == 1:
        return chunk
    records = tuple(
        _sample(record, item_of(record).index * samples + i, i)
        for record in chunk.records
        for i in range(samples)
    )
    places = [place for place in range(len(chunk.records)) for _ in range(samples)]
    return Chunk(records, chunk.at(places).batch)


def _sample(record: Item | Failure, index: int, sample_index: int) -> Item | Failure:
    item = item_of(record)._replace(index=index, sample_index=sample_index)
    return record._replace(item=item) if isinstance(record, Failure) else item


def _expand(name: str) -> list[str]:
    """List the files that an argument names; a file whose name looks like a glob is that file."""
    if Path(name).exists() or not has_magic(name):
        return [name]
    found = sorted(glob(name, recursive=True))  # noqa: PTH207  Path takes no absolute pattern
    paths = [path for path in found if not is_in_run_dir(Path(path))]
    if not paths:
        raise UsageError(f"{name}: no file matches this pattern; check it from this directory.")
    return paths


def is_in_run_dir(path: Path) -> bool:
    """Whether a file is one of ours in the run directory of some job: a journal is no input."""
    folder = path.parent
    return folder.name.endswith(".run") and (folder / "lock").exists()


def _checked(source: Source) -> Source:
    """Refuse at once what the later passes could only stumble over."""
    name, path = source.name, source.path
    if path.is_dir():
        raise UsageError(f"{name}: is a directory; name its files, for example '{name}/*.jsonl'.")
    if not path.exists():
        raise UsageError(f"{name}: no such file; check the path.")
    if not path.is_file():
        raise UsageError(f"{name}: is no file, but a job reads its input again; pipe it into -.")
    if is_in_run_dir(path):
        raise UsageError(f"{name}: belongs to the run directory of a job; name what it answered.")
    files.check(source)
    return source


def _record_of(index: int, source: Source, raw: Raw) -> Item | Failure:
    """Make an Item of a record, unless a value that the job needs cannot be read."""
    where = f"{source.name}:{raw.number}"
    if raw.flaw is not None:
        item = Item(index, f"#{index}", digest_of(raw.line), where)
        return Failure(item, "bad_record", f"{where}: {raw.flaw}; repair it.")
    record = record_of_line(index, where, raw.line, source.wanted.id_column)
    return _judged(record, source, raw) if raw.unreadable else record


def _judged(record: Item | Failure, source: Source, raw: Raw) -> Item | Failure:
    """Fail a record that has null where the job needs a value that cannot be read."""
    said = [each.value for each in raw.unreadable.values()]
    item = item_of(record)._replace(digest=digest_of(raw.line + orjson.dumps(said)))
    if isinstance(record, Failure):
        return record._replace(item=item)
    for name, flaw in raw.unreadable.items():
        if source.wanted.needs(name):
            message = f"{item.where}: the value of column `{name}` is {flaw.why}; repair it"
            way = "" if source.wanted.asks(name) else ", or leave it out with --drop"
            return Failure(item, "bad_record", f"{message}{way}.")
    return item


def record_of_line(index: int, where: str, line: bytes, id_column: str | None) -> Item | Failure:
    """Parse one line. What it is called, and what of it can be read, is kept whatever is wrong."""
    found = parse(line)
    nameless = Item(index, f"#{index}", digest_of(line), where, found.record, notes=found.notes)
    named = _named(nameless, id_column)
    if found.problem is None:
        return named
    return Failure(item_of(named), "bad_record", f"{where}: {found.problem}")


def _named(nameless: Item, id_column: str | None) -> Item | Failure:
    """Give an item its `custom_id`, else its `id`, or what the option says; else its position."""
    column, record = id_column or "custom_id", nameless.record
    given = record.get(column)
    name = _name(given)
    if name is None and not _is_absent(given):
        return Failure(
            nameless,
            "bad_record",
            f"{nameless.where}: `{column}` is {given!a}, expected a string or a number.",
        )
    if name is None and id_column is None:
        name = _name(record.get("id"))
    return nameless if name is None else nameless._replace(custom_id=name)


def _name(value: Json) -> str | None:
    """Read a value as a name: 1.0, as tables with nulls have 1, is `1`; None: it is none."""
    if isinstance(value, bool) or _is_absent(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | float) or _is_word(value) else None


def _is_absent(value: Json) -> bool:
    if isinstance(value, str):  # an empty cell of a CSV file, for example
        return not value.strip()
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _is_word(value: Json) -> bool:
    return isinstance(value, str) and is_text(value)
