r"""Stream records out of files; each becomes an Item or a Failure, and none is lost.

A line ends at `\n` and nowhere else (U+2028 and a bare `\r` are legal inside JSON). A line of
blanks is not a record. A byte order mark at the start of a file and `\r\n` are tolerated.
NaN, integers of any size and half surrogate pairs are read, see json_text.py.
A Parquet row is read as the JSON line that says the same, so both share one path from there on:
binary becomes base64, times and decimals become text, NaN becomes null. Only `Item.record` is
affected; the output takes the columns from the Arrow data itself.
"""

import gzip
import hashlib
import io
import math
import shutil
import zlib
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from itertools import compress
from pathlib import Path
from typing import BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.errors import UsageError
from dspark_batch.job import hub
from dspark_batch.job.json_text import is_text, parse
from dspark_batch.types import Failure, Item, Json

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
STDIN = "-"
STDIN_NAME = "<stdin>"

_BOM = b"\xef\xbb\xbf"
_CHUNK_RECORDS = 1000
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """One input file."""

    name: str  # as the user typed it: what messages and manifests say
    path: Path  # what is opened
    id_column: str | None = None  # names its records; None: `custom_id`, else `id`

    @property
    def is_remote(self) -> bool:
        """Whether `fetch` has to get it."""
        return self.name.startswith(hub.SCHEME)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring records of one file, few enough to hold in memory."""

    records: tuple[Item | Failure, ...]
    batch: pa.RecordBatch | None = None  # the same records with their types; None: not from Parquet

    def only(self, keep: Sequence[bool]) -> "Chunk":
        """Select records."""
        if all(keep):
            return self
        batch = None if self.batch is None else self.batch.filter(pa.array(keep, pa.bool_()))
        return Chunk(tuple(compress(self.records, keep)), batch)


def locate(
    inputs: Iterable[str],
    stdin: Path,
    fetched: Path = Path("fetched"),
    id_column: str | None = None,
) -> tuple[Source, ...]:
    """Resolve paths, globs (in name order) and `-`, and refuse what cannot be an input.

    Args:
        inputs: as typed.
        stdin: where `spool` puts standard input.
        fetched: the folder where `fetch` puts files of the Hub.
        id_column: names the records; None: `custom_id`, else `id`.
    """
    sources: list[Source] = []
    for name in inputs:
        if name == STDIN:
            sources.append(Source(STDIN_NAME, stdin))
        elif name.startswith(hub.SCHEME):
            there = (_readable(each) for each in hub.expand(name))
            sources += [Source(each, hub.place(each, fetched)) for each in there]
        else:
            sources += [_checked(Source(printable(path), Path(path))) for path in _expand(name)]
    return tuple(replace(source, id_column=id_column) for source in sources)


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
    """Get the files of the Hub that are not here yet, and refuse what cannot be read."""
    for source in sources:
        if source.is_remote:
            hub.fetch(source.name, source.path)
            _check_arrow(source)


def read(
    sources: Iterable[Source], limit: int | None = None, samples: int = 1
) -> Iterator[Item | Failure]:
    """Yield the first `limit` records of all sources, in order; None: all of them.

    Each comes `samples` times, one after the other.
    """
    for chunk in read_chunks(sources, limit, samples):
        yield from chunk.records


def read_chunks(
    sources: Iterable[Source], limit: int | None = None, samples: int = 1
) -> Iterator[Chunk]:
    """Yield what `read` yields, chunk by chunk, with the Arrow data of Parquet files."""
    index = 0
    for source in sources:
        for lines, batch in _raw_chunks(source):
            room = len(lines) if limit is None else limit - index
            if room <= 0:
                return
            records = tuple(
                _record(index + i, f"{source.name}:{number}", line, source.id_column)
                for i, (number, line) in enumerate(lines[:room])
            )
            yield _repeated(Chunk(records, batch and batch.slice(0, room)), samples)
            index += len(records)


def count_records(source: Source) -> int:
    """Count the records of one file without parsing them."""
    if source.path.suffix == ".parquet":
        with _parquet(source) as file:
            return file.metadata.num_rows
    return sum(1 for _ in _lines(source))


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
    if chunk.batch is None:
        return Chunk(records)
    places = [place for place in range(len(chunk.records)) for _ in range(samples)]
    return Chunk(records, chunk.batch.take(pa.array(places, pa.int64())))


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


def printable(path: str) -> str:
    """Replace the bytes of a file name that are not text, so that a row can say it."""
    return path.encode("utf-8", "replace").decode()


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
    _readable(name)
    _check_arrow(source)
    return source


def _readable(name: str) -> str:
    """Pass on a name whose ending says how to read the file."""
    if not name.endswith(FORMATS):
        job = " A job file comes first, and alone." if name.endswith(".toml") else ""
        raise UsageError(
            f"{name}: expected one of {', '.join(FORMATS)}; convert or rename it.{job}"
        )
    return name


def _check_arrow(source: Source) -> None:
    """Refuse a file that Arrow opens for us, if it cannot, or not in a way that we can use."""
    name, path = source.name, source.path
    if path.suffix in (".parquet", ".zst") and printable(str(path)) != str(path):
        raise UsageError(f"{name}: has a name that is not UTF-8; rename it.")
    if path.suffix == ".parquet":
        with _parquet(source) as file:
            names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise UsageError(f"{name}: two columns share a name; rename one of them.")


def _parquet(source: Source) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source.path)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{source.name}: not a whole Parquet file ({error}); copy or write it again."
        ) from error


def _raw_chunks(
    source: Source,
) -> Iterator[tuple[list[tuple[int, bytes]], pa.RecordBatch | None]]:
    """Yield the (number from 1, line) pairs of each chunk, and its Arrow data if there is any."""
    if source.path.suffix == ".parquet":
        return _parquet_chunks(source)
    return ((lines, None) for lines in _line_chunks(_lines(source)))


def _line_chunks(lines: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Group lines so that neither many short ones nor a few huge ones fill the memory."""
    chunk: list[tuple[int, bytes]] = []
    size = 0
    for number, line in lines:
        chunk.append((number, line))
        size += len(line)
        if len(chunk) == _CHUNK_RECORDS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line without its ending) of every line that is not blank."""
    try:
        with _open(source.path) as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.removeprefix(_BOM) if number == 1 else raw
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if line.strip(b" \t\r"):
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"{source.name}: cannot be read to its end ({error}); copy or compress it again."
        ) from error


def _open(path: Path) -> BinaryIO:
    """Open a file for its plain bytes. Zstandard by pyarrow: others read a cut file short."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _parquet_chunks(
    source: Source,
) -> Iterator[tuple[list[tuple[int, bytes]], pa.RecordBatch]]:
    number = 1
    try:
        with _parquet(source) as file:
            for batch in file.iter_batches(batch_size=_CHUNK_RECORDS):
                rows = batch.cast(_speakable_schema(batch.schema)).to_pylist()
                lines = [orjson.dumps(row, default=_speakable) for row in rows]
                yield list(enumerate(lines, number)), batch
                number += len(lines)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{source.name}: cannot be read from row {number} on ({error}); write it again."
        ) from error


def _speakable_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(_speakable_type(field.type)) for field in schema])


def _speakable_type(kind: pa.DataType) -> pa.DataType:
    """Replace times, which Python's own types would cut to microseconds, by text."""
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_speakable_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_speakable_type(field.type)) for field in kind])
    return kind


def _speakable(value: object) -> Json:
    """Say as JSON what orjson does not know: base64 for bytes, text for the rest."""
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _record(index: int, where: str, line: bytes, id_column: str | None) -> Item | Failure:
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
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _is_word(value: Json) -> bool:
    return isinstance(value, str) and is_text(value)
