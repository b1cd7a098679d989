r"""Records as files hold them. What a file is, its first bytes say; a name decides only about CSV.

A line ends at `\n` and nowhere else (U+2028 and a bare `\r` are legal inside JSON). A line of
blanks is not a record. A byte order mark at the start of a file and `\r\n` are tolerated.
Each record becomes one piece of JSON, so that all share one path from there on.
"""

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.errors import UsageError
from dspark_batch.intake.values import Unreadable, Values, taken_of, text_or_unreadable, values_of
from dspark_batch.types import Json

Form: TypeAlias = Literal["lines", "array", "objects", "csv", "tsv", "parquet", "arrow"]
Unpacked: TypeAlias = io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile

T = TypeVar("T")

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # the first ones also packed
_ENDING = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv)(\.(gz|zst|bz2|xz))?$|\.(parquet|arrow|feather)$"
)
_PACKED: Mapping[bytes, Callable[[Path], Unpacked]] = {
    b"\x1f\x8b": gzip.GzipFile,
    # By pyarrow: others read a cut file short.
    b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(
        pa.CompressedInputStream(path.open("rb"), "zstd")
    ),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
_TABLES: Mapping[bytes, Form] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # its stream, without the frame of a file
}
_UTF_16 = "is text in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`."
_UTF_32 = "is text in UTF-32; convert it with `iconv -f UTF-32 -t UTF-8`."
_WIDE: Mapping[
    tuple[bool, ...], str
] = {  # which of every four bytes are ever zero -> what the text is in
    (False, True, False, True): _UTF_16,
    (True, False, True, False): _UTF_16,
    (False, True, True, True): _UTF_32,
    (True, True, True, False): _UTF_32,
}
_NO_TEXT = "is no text and no table that we know; convert it."
_TABLE = "is a table of text and no JSON; name it .csv, or .tsv if tabs part its columns."
_NO_JSON = "is no JSON, by its first lines; convert it."
_REFUSED: Mapping[bytes, str] = {
    **dict.fromkeys((b"\xff\xfe\0\0", b"\0\0\xfe\xff"), _UTF_32),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), _UTF_16),
    b"version https://git-lfs": "is a Git LFS pointer, not the file; get it with `git lfs pull`.",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; unpack it, or save it as CSV.",
    b"PARE": "is an encrypted Parquet file; write it without encryption.",
    b"FEA1": "is a Feather file of version 1; write it as Parquet.",
    b"ORC": "is an ORC file; write it as Parquet.",
    b"Obj\x01": "is an Avro file; write it as Parquet.",
    b"SQLite format 3": "is an SQLite database; write its table as CSV or Parquet.",
    b"%PDF": "is a PDF; a job needs records, such as JSON lines.",
}
_HTML = re.compile(rb"<(!doctype|html|head|body|\?xml|error)\b", re.IGNORECASE)
# Column names with commas or tabs between them, or the one name that a table would have.
_HEADER = re.compile(rb'\s*(("?[^\W\d][\w .-]*"?)([,;\t]"?[^\W\d][\w .-]*"?)+|"?prompt"?)\s*$')
_RECORD = re.compile(rb"^\s*\{", re.MULTILINE)
_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 16
_PIECE_BYTES = 1 << 20
_CHUNK_RECORDS = 1000
_CHUNK_BYTES = 4 << 20
_CUT = (OSError, EOFError, zlib.error, lzma.LZMAError)
_NO_TABLE = (pa.ArrowException, OSError, UnicodeDecodeError)

_OURS = orjson.OPT_PASSTHROUGH_DATACLASS  # what is Unreadable goes to `default`
# What the shape of JSON depends on; strings are passed over.
_MARK = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_STEP = {b"[": 1, b"{": 1, b"]": -1, b"}": -1, b",": 0, b"": 0}  # mark -> how much deeper


class Wanted(NamedTuple):
    """What a job wants of the columns of its inputs."""

    asks: Callable[[str], bool] = lambda column: False  # binary in it is text
    passes: Callable[[str], bool] = lambda column: True  # it comes out as it went in
    id_column: str | None = None  # names the records; None: `custom_id`, else `id`

    def needs(self, column: str) -> bool:
        """Whether a value that cannot be read costs its record."""
        return self.asks(column) or self.passes(column)


EVERY = Wanted()  # nothing is asked, and all comes out


@dataclass(frozen=True, slots=True)
class Source:
    """One input file."""

    name: str  # as the user typed it: what messages and manifests say
    path: Path  # what is opened
    wanted: Wanted = field(default=EVERY, compare=False, repr=False)
    url: str | None = None  # where `path` is fetched from; None: it is here


class Raw(NamedTuple):
    """A record before it is looked at."""

    number: int  # of its line, row or element, from 1: what "prompts.jsonl:12" says
    line: bytes  # JSON, if it is a record at all
    unreadable: Mapping[str, Unreadable] = MappingProxyType({})  # column -> what is null in `line`
    flaw: str | None = None  # why it is no record; None: its JSON decides


RawChunk: TypeAlias = tuple[list[Raw], pa.RecordBatch | None]  # None: not from Arrow


def form_of(source: Source) -> Form:
    """Say what a file is.

    Raises:
        UsageError: it is nothing that can be read, in one sentence.
    """
    with readable(source), _unpacked(source.path) as stream:
        head = stream.read(_HEAD_BYTES)
    table = _by_magic(head, _TABLES)
    if table is not None:
        _refuse_packed(source, table)
        return table
    _refuse(source, head)
    return _form_of_text(source, head.lstrip())


def check(source: Source) -> None:
    """Refuse at once what the later passes could only stumble over.

    Raises:
        UsageError: what is wrong with the file, in one sentence.
    """
    form = form_of(source)
    if form in ("parquet", "arrow"):
        names = _schema(source, form).names
    elif form in ("csv", "tsv"):
        names = _header(source, form)
    else:
        return
    if len(set(names)) < len(names):
        raise UsageError(f"{source.name}: two columns share a name; rename one of them.")


def raw_chunks(source: Source) -> Iterator[RawChunk]:
    """Yield the records of a file, as many at a time as memory holds with ease."""
    form = form_of(source)
    if form in ("parquet", "arrow"):
        return _table_chunks(source, form)
    return ((raws, None) for raws in _grouped(_raws(source, form)))


def count_records(source: Source) -> int:
    """Count the records of a file without parsing them."""
    form = form_of(source)
    if form == "parquet":
        with _parquet(source) as file:
            return file.metadata.num_rows
    if form == "arrow":
        return sum(batch.num_rows for batch in _batches(source, form))
    return sum(1 for _ in _raws(source, form))


@contextmanager
def readable(source: Source) -> Iterator[None]:
    """Say of a file that cannot be read to its end that this is so."""
    try:
        yield
    except _CUT as error:
        raise UsageError(
            f"{source.name}: cannot be read to its end ({_reason(error)}); copy or pack it again."
        ) from error


def _reason(error: Exception) -> str:
    """Say in one line why something failed."""
    return " ".join(str(error).split()).removesuffix(".")


def printable(path: str) -> str:
    """Replace the bytes of a file name that are not text, so that a row can say it."""
    return path.encode("utf-8", "replace").decode()


def _by_magic(head: bytes, by_magic: Mapping[bytes, T]) -> T | None:
    return next((by_magic[magic] for magic in by_magic if head.startswith(magic)), None)


def _unpacked(path: Path) -> Unpacked:
    """Open a file for its plain bytes, behind a byte order mark."""
    with path.open("rb") as file:
        open_packed = _by_magic(file.read(8), _PACKED)
    stream: Unpacked = open_packed(path) if open_packed else path.open("rb")
    try:
        if stream.peek(len(_BOM)).startswith(_BOM):
            stream.read(len(_BOM))
    except _CUT:
        stream.close()
        raise
    return stream


def _refuse_packed(source: Source, table: Form) -> None:
    with source.path.open("rb") as file:
        if not _by_magic(file.read(8), _TABLES):
            raise UsageError(f"{source.name}: is a packed {table} file; unpack it first.")


def _refuse(source: Source, head: bytes) -> None:
    sentence = _by_magic(head, _REFUSED)
    if _by_magic(head, _PACKED):
        sentence = "is packed twice; unpack it once."
    if sentence is None and head[257:262] == b"ustar":
        sentence = "is a tar archive; unpack it."
    if sentence is None and _HTML.match(head.lstrip()):
        sentence = "is a page of HTML or XML and not the file; download it again, logged in."
    if sentence is None and head[:16].count(0) >= 4:
        sentence = _WIDE.get(tuple(0 in head[i:16:4] for i in range(4)), _NO_TEXT)
    if sentence is not None:
        raise UsageError(f"{source.name}: {sentence}")


def _form_of_text(source: Source, text: bytes) -> Form:
    name = source.path.name.lower()
    known = _ENDING.search(name)
    if known and known[1] == "csv":
        return "csv"
    if known and known[1] == "tsv":
        return "tsv"
    first, _, rest = text.partition(b"\n")
    if text.startswith(b"["):
        return "lines" if rest.strip() and _is_json(first) else "array"
    if text.startswith(b"{"):
        is_open = (
            rest and name.partition(".json")[2][:1] != "l" and not first.rstrip().endswith(b"}")
        )
        is_alone = first.strip() == b"{" and rest.strip()
        return "objects" if is_alone or is_open else "lines"
    if known and known[4]:
        return "arrow" if known[4] != "parquet" else "parquet"
    if not known:
        job = " A job file comes first, and alone." if name.endswith(".toml") else ""
        raise UsageError(
            f"{source.name}: expected one of {', '.join(ENDINGS)}; convert or rename it.{job}"
        )
    if first and not _RECORD.search(text) and not _is_json(first):
        sentence = _TABLE if _HEADER.match(first) else _NO_JSON
        raise UsageError(f"{source.name}: {sentence}")
    return "lines"


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _grouped(raws: Iterable[Raw]) -> Iterator[list[Raw]]:
    """Group records so that neither many short ones nor a few huge ones fill the memory."""
    chunk: list[Raw] = []
    size = 0
    for raw in raws:
        chunk.append(raw)
        size += len(raw.line)
        if len(chunk) == _CHUNK_RECORDS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _raws(source: Source, form: Form) -> Iterator[Raw]:
    """Yield the records of a file of text."""
    with readable(source), _unpacked(source.path) as stream:
        if form == "lines":
            yield from _lines(stream)
        elif form in ("csv", "tsv"):
            yield from _rows(source, stream, form)
        else:
            values = _elements(source, stream) if form == "array" else _objects(source, stream)
            yield from (Raw(number, value) for number, value in enumerate(values, 1))


def _lines(stream: Unpacked) -> Iterator[Raw]:
    """Yield every line that is not blank, without its ending."""
    for number, raw in enumerate(stream, 1):
        line = raw.removesuffix(b"\n").removesuffix(b"\r")
        if line.strip(b" \t\r"):
            yield Raw(number, line)


def _marks(stream: Unpacked) -> Iterator[tuple[bytes, bytes]]:
    """Cut JSON behind each bracket, brace and comma outside strings: (text with it, it).

    The last piece has no mark.
    """
    rest = b""
    while block := stream.read(max(_PIECE_BYTES, len(rest))):
        block, begin = rest + block, 0
        for match in _MARK.finditer(block):
            mark = match[0]
            if mark == b'"':  # of a string that goes on in the next block
                break
            if len(mark) == 1:
                yield block[begin : match.end()], mark
                begin = match.end()
        rest = block[begin:]
    yield rest, b""


def _elements(source: Source, stream: Unpacked) -> Iterator[bytes]:
    """Yield the elements of a JSON array, each as it stands there."""
    marks = _marks(stream)
    next(marks)  # the bracket that opens it
    depth, element = 1, bytearray()
    for text, mark in marks:
        depth += _STEP[mark]
        is_end = depth == 0
        if is_end or (depth == 1 and mark == b","):
            element += text[:-1]
            if not is_end or element.strip():
                yield bytes(element.strip())
            element = bytearray()
        else:
            element += text
        if is_end:
            break
    else:
        raise UsageError(f"{source.name}: its JSON array has no end; copy or write it again.")
    if any(text.strip() for text, _ in marks):
        raise UsageError(
            f"{source.name}: goes on behind the end of its JSON array; write one record a line."
        )


def _objects(source: Source, stream: Unpacked) -> Iterator[bytes]:
    """Yield JSON objects that are written over several lines, one after the other."""
    depth, value = 0, bytearray()
    for text, mark in _marks(stream):
        value += text
        depth += _STEP[mark]
        if depth <= 0 and mark in (b"}", b"]"):
            yield bytes(value.strip())
            depth, value = 0, bytearray()
    if value.strip():
        raise UsageError(f"{source.name}: its last object has no end; copy or write it again.")


def _rows(source: Source, stream: Unpacked, form: Form) -> Iterator[Raw]:
    """Yield the rows of a table of text; all values are strings, as they stand there."""
    taken: list[str] = []  # the lines of the row

    def remembered() -> Iterator[str]:
        for line in _texts(stream):
            taken.append(line)
            yield line

    csv.field_size_limit(2**31 - 1)  # else a long text is an error
    rows = csv.reader(remembered(), strict=True, delimiter="," if form == "csv" else "\t")
    names = _names(source, rows)
    while True:
        number = rows.line_num + 1
        taken.clear()
        try:
            fields = next(rows, None)
        except csv.Error as error:
            if "end of data" in str(error):
                raise UsageError(
                    f"{source.name}:{number}: a quote opens here that nothing closes; repair it."
                ) from error
            yield Raw(
                number,
                _bytes("".join(taken)),
                flaw=f"not a row of {form.upper()} ({_reason(error)})",
            )
            continue
        if fields is None:
            return
        if fields:
            yield _row(number, names, fields)


def _names(source: Source, rows: Iterator[list[str]]) -> Sequence[str]:
    """Read the header."""
    try:
        names = next((row for row in rows if row), [])
        "".join(names).encode()
    except (csv.Error, UnicodeEncodeError) as error:
        raise UsageError(
            f"{source.name}: its first line is no header in UTF-8 ({_reason(error)}); repair it."
        ) from error
    return names


def _header(source: Source, form: Form) -> Sequence[str]:
    with readable(source), _unpacked(source.path) as stream:
        delimiter = "," if form == "csv" else "\t"
        return _names(source, csv.reader(_texts(stream), strict=True, delimiter=delimiter))


def _texts(stream: Unpacked) -> Iterator[str]:
    return (line.decode("utf-8", "surrogateescape") for line in stream)


def _row(number: int, names: Sequence[str], fields: Sequence[str]) -> Raw:
    values = [text_or_unreadable(_bytes(text)) for text in fields]
    if len(fields) == len(names):
        return _raw(number, dict(zip(names, values, strict=True)))
    flaw = f"{len(fields)} fields, where the header has {len(names)}"
    return Raw(number, "\0".join(fields).encode("utf-8", "surrogateescape"), flaw=flaw)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _raw(number: int, columns: Mapping[str, "Json | Unreadable"]) -> Raw:
    """Write a record as JSON, with null for each column that cannot be read."""
    found: list[Unreadable] = []
    line = orjson.dumps(columns, found.append, _OURS)
    if not found:
        return Raw(number, line)
    flaws = {name: flaw for name, value in columns.items() if (flaw := _flaw_of(value))}
    return Raw(number, orjson.dumps({**columns, **dict.fromkeys(flaws)}), flaws)


def _flaw_of(value: "Json | Unreadable") -> Unreadable | None:
    found: list[Unreadable] = []
    orjson.dumps(value, found.append, _OURS)
    return found[0] if found else None


def _parquet(source: Source) -> pq.ParquetFile:
    try:
        unit = _unit_of_int96(source.path, source.path.stat().st_mtime_ns)
        return pq.ParquetFile(source.path, coerce_int96_timestamp_unit=unit)
    except _NO_TABLE as error:
        raise UsageError(
            f"{source.name}: not a whole Parquet file ({_reason(error)}); copy or write it again."
        ) from error


@lru_cache(maxsize=64)
def _unit_of_int96(path: Path, changed_at: int) -> Literal["us"] | None:
    """Say how the times of Hive and Spark are read; None: with nanoseconds, which reach 1677-2262.

    Arrow does not notice that a time lies outside: year 9999 becomes 1816.
    """
    with (
        pq.ParquetFile(path) as fine,
        pq.ParquetFile(path, coerce_int96_timestamp_unit="us") as wide,
    ):
        leaves = (fine.schema.column(i) for i in range(fine.metadata.num_columns))
        names = {leaf.path.split(".")[0] for leaf in leaves if leaf.physical_type == "INT96"}
        if not names:
            return None
        batches = (each.iter_batches(columns=list(names)) for each in (fine, wide))
        for narrow, right in zip(*batches, strict=True):
            columns = zip(narrow.columns, right.columns, strict=True)
            if any(not a.cast(b.type, safe=False).equals(b) for a, b in columns):
                return "us"
    return None


def _schema(source: Source, form: Form) -> pa.Schema:
    """Read the names and types of a table's columns."""
    if printable(str(source.path)) != str(source.path):
        raise UsageError(f"{source.name}: has a name that is not UTF-8; rename it.")
    if form == "arrow":
        with _opened_arrow(source) as file:
            schema = file.schema
    else:
        with _parquet(source) as file:
            schema = file.schema_arrow
    try:
        str(schema)  # has the names of all fields
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source.name}: a column has a name that is not UTF-8 ({error}); rename it."
        ) from error
    return schema


def _opened_arrow(source: Source) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    with source.path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    try:
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source.path)
    except _NO_TABLE as error:
        raise UsageError(
            f"{source.name}: not a whole Arrow file ({_reason(error)}); copy or write it again."
        ) from error


def _batches(source: Source, form: Form) -> Iterator[pa.RecordBatch]:
    if form == "parquet":
        with _parquet(source) as file:
            yield from _read(source, file)
        return
    with _opened_arrow(source) as file:
        batches = file if isinstance(file, pa.RecordBatchStreamReader) else _in_turn(file)
        for batch in batches:
            batch.validate()
            for begin in range(0, batch.num_rows, _CHUNK_RECORDS):
                yield batch.slice(begin, _CHUNK_RECORDS)


def _read(source: Source, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Read batches; where Arrow refuses text that is no UTF-8 in a dictionary, without that."""
    done = 0
    try:
        for batch in file.iter_batches(batch_size=_CHUNK_RECORDS):
            done += batch.num_rows
            yield batch
    except pa.ArrowInvalid:
        names = [field.name for field in file.schema_arrow if "dictionary<" in str(field.type)]
        if not names:
            raise
        for batch in _with_plain_columns(source, file, names):
            if done <= 0:
                yield batch
            done -= batch.num_rows


def _with_plain_columns(
    source: Source, file: pq.ParquetFile, names: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Read some columns as the types of Parquet, which has no dictionaries."""
    all_names = file.schema_arrow.names
    others = [name for name in all_names if name not in names]
    with pq.ParquetFile(source.path, metadata=_without_arrow_schema(source.path)) as plain:
        read = plain.iter_batches(_CHUNK_RECORDS, columns=names)
        if not others:
            yield from read
            return
        for rest, some in zip(file.iter_batches(_CHUNK_RECORDS, columns=others), read, strict=True):
            columns = [(some if name in names else rest).column(name) for name in all_names]
            yield pa.RecordBatch.from_arrays(columns, all_names)


def _without_arrow_schema(path: Path) -> pq.FileMetaData:
    """Read what a Parquet file says of itself, without the types that Arrow would give it."""
    with path.open("rb") as file:
        file.seek(-8, io.SEEK_END)
        size = int.from_bytes(file.read(4), "little")
        file.seek(-8 - size, io.SEEK_END)
        footer = file.read()
    hidden = footer.replace(b"ARROW:schema", b"ARROW.schema")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + hidden))


def _in_turn(file: pa.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    return (file.get_batch(i) for i in range(file.num_record_batches))


def _table_chunks(source: Source, form: Form) -> Iterator[RawChunk]:
    number, schema = 1, _schema(source, form)
    try:
        for batch in _batches(source, form):
            raws = raws_of(batch, source.wanted, number)
            yield raws, _as_declared(_with_nulls(batch, raws), schema)
            number += len(raws)
    except _NO_TABLE as error:
        raise UsageError(
            f"{source.name}: cannot be read from row {number} on ({_reason(error)}); write it "
            "again."
        ) from error


def _with_nulls(batch: pa.RecordBatch, raws: Sequence[Raw]) -> pa.RecordBatch:
    """Replace by null what cannot be read."""
    for name in {name for raw in raws for name in raw.unreadable}:
        places = [None if name in raw.unreadable else i for i, raw in enumerate(raws)]
        index = batch.schema.get_field_index(name)
        column = batch.column(index)
        if pa.types.is_dictionary(column.type):  # which would keep its words
            column = taken_of(column.dictionary, column.indices.to_pylist())
        column = taken_of(column, places)
        batch = batch.set_column(index, pa.field(name, column.type), column)
    return batch


def _as_declared(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Give columns that were read as something plainer the types of their file again."""
    for index, declared in enumerate(schema):
        if batch.column(index).type != declared.type:
            with suppress(pa.ArrowException):
                column = batch.column(index).cast(declared.type)
                batch = batch.set_column(index, declared.with_nullable(True), column)
    return batch


def raws_of(batch: pa.RecordBatch, wanted: Wanted, number: int = 1) -> list[Raw]:
    """Write the rows of a table as records, the first one with this number."""
    names = batch.schema.names
    rows = zip(*_said(batch, wanted), strict=True)
    return [_raw(i, dict(zip(names, row, strict=True))) for i, row in enumerate(rows, number)]


def _said(batch: pa.RecordBatch, wanted: Wanted) -> Iterator[Values]:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        yield values_of(column, binary_is_text=wanted.asks(name))
