"""Rows of an output as people want to see them: what was asked, what came."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from glob import has_magic
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple, TypeAlias

from dspark_batch.errors import DsparkBatchError, UsageError
from dspark_batch.intake.files import form_of
from dspark_batch.intake.mapping import last_question
from dspark_batch.intake.reader import Source, item_of, locate, read
from dspark_batch.intake.remote import is_url
from dspark_batch.output.finish import line_maker
from dspark_batch.output.look import look
from dspark_batch.record.named_columns import wanted_columns
from dspark_batch.record.rows import ROW_SCHEMA, layout_of
from dspark_batch.record.run_dir import RunDir
from dspark_batch.spec.spec import OUTPUTS, Spec
from dspark_batch.spec.where import Meant, Where
from dspark_batch.types import Failure, Item, Json

Row: TypeAlias = Mapping[str, Json]

_ACCEPT_LENGTH = ("metrics", "speculative_decoding", "mean_acceptance_length")


class Shown(NamedTuple):
    """One row for people."""

    custom_id: str
    prompt: str  # what the answer answers; "": nobody can tell
    answer: str  # or why there is none
    accept_length: float | None  # None: no rounds
    reasoning: str | None = None  # None: the model did not think, or nobody can tell
    sample_index: int | None = None  # None: nobody can tell
    finish_reason: str | None = None  # None: there is no answer


def rows_of(
    out: str, *, where: Sequence[Where] = (), custom_id: str | None = None
) -> Iterator[Shown]:
    """Show the rows of an output, finished or not.

    What was asked is told by the input; where that is gone, by the columns of the output.

    Args:
        out: the output of a job.
        where: only the rows for which one of these holds; (): all.
        custom_id: only the rows of this item; None: of all.

    Raises:
        UsageError: there is no such output or column, or it is no output of ours.
    """
    is_meant = Meant(where)
    lines, spec = _lines(out)
    for line, item in lines:
        if is_meant(line):
            shown = _shown(line, item, spec)
            if custom_id in (None, shown.custom_id):
                yield shown
    is_meant.check(out)


def first_rows(out: str, limit: int) -> list[Shown]:
    """Show the first rows of an output; see `rows_of`."""
    return list(islice(rows_of(out), limit))


def _lines(out: str) -> tuple[Iterator[tuple[Row, Item | None]], Spec]:
    """Give the lines of an output with the records that they answer, as far as they are here."""
    run_dir = RunDir(out)
    if not run_dir.out.exists():
        return _lines_so_far(out), look(out).spec
    if run_dir.out.suffix not in OUTPUTS:
        raise UsageError(f"{out}: expected an output, which ends in {' or '.join(OUTPUTS)}.")
    spec = look(out).spec if run_dir.has_output() else Spec(inputs=("-",), out=out)
    pairs = zip_longest(_lines_in(run_dir.out, out), _items(run_dir, spec))
    return ((line, item) for line, item in pairs if line is not None), spec


def _lines_so_far(out: str) -> Iterator[tuple[Row, Item]]:
    """Join the rows of a job that is not finished, in input order."""
    job = look(out)
    line_of = line_maker(job.spec, datetime.fromisoformat(job.manifest["created"]))
    with job.rows() as rows:
        for item, entry in rows.answered():
            yield line_of(item, entry.row), item


def _lines_in(path: Path, out: str) -> Iterator[Row]:
    source = Source(out, path)
    if form_of(source) not in ("lines", "parquet"):
        raise UsageError(f"{out}: no output of ours (a line is no row). Name the --out of a run.")
    for record in read([source]):
        if isinstance(record, Failure):
            raise UsageError(
                f"{record.message} This is no output of ours: name the --out of a run."
            )
        yield record.record


def _items(run_dir: RunDir, spec: Spec) -> Iterator[Item]:
    """Read the records again; none, if the input is not here any more."""
    inputs = run_dir.inputs()
    if inputs is None or any(is_url(name) and has_magic(name) for name in spec.inputs):
        return
    try:
        kept = (run_dir.stdin, run_dir.fetched, wanted_columns(spec))
        part = spec.part_of(sum(each["records"] for each in inputs))
        yield from map(item_of, read(locate(spec.inputs, *kept), part, spec.samples))
    except (DsparkBatchError, OSError):  # the rows are worth showing without it
        return


def _shown(line: Row, item: Item | None, spec: Spec) -> Shown:
    row = _of_response(line) if "response" in line and "custom_id" in line else _of_row(line, spec)
    custom_id = str(row.get("custom_id"))
    length, sample = _at(row, *_ACCEPT_LENGTH), row.get("sample_index")
    return Shown(
        custom_id,
        last_question(item.record if item and item.custom_id == custom_id else line, spec),
        _answer(row),
        length if isinstance(length, float) else None,
        _text(row.get("reasoning")),
        sample if isinstance(sample, int) else None,
        _text(row.get("finish_reason")),
    )


def _answer(row: Row) -> str:
    if row.get("error"):
        return f"{_at(row, 'error', 'code')}: {_at(row, 'error', 'message')}"
    return _text(row.get("completion")) or ""


def _at(value: Json, *path: str) -> Json:
    """Look into objects; None: nothing is there. A line may be no row of ours at all."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _text(value: Json) -> str | None:
    return value if isinstance(value, str) else None


def _of_row(line: Row, spec: Spec) -> Row:
    """Give our columns their own names again."""
    names = layout_of(spec).our_names
    return {name: line.get(names[name]) for name in ROW_SCHEMA.names}


def _of_response(line: Row) -> Row:
    """Read a line of the OpenAI format as a row."""
    body = _at(line, "response", "body")
    choices = _at(body, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = _at(choice, "message") or {"content": _at(choice, "text")}
    return {
        "custom_id": line["custom_id"],
        "completion": _at(message, "content"),
        "reasoning": _at(message, "reasoning_content"),
        "finish_reason": _at(choice, "finish_reason"),
        "error": line.get("error"),
        "metrics": _at(body, "metrics"),
    }
