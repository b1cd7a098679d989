"""The first rows of an output as people want to see them: what was asked, what came."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.errors import DsparkBatchError, UsageError
from dspark_batch.job import hub
from dspark_batch.job.json_text import parse
from dspark_batch.job.look import look
from dspark_batch.job.mapping import last_question
from dspark_batch.job.reader import item_of, locate, read
from dspark_batch.job.rows import ROW_SCHEMA, layout_of
from dspark_batch.job.run_dir import RunDir
from dspark_batch.job.spec import OUTPUTS, Spec
from dspark_batch.types import Item, Json

Row = Mapping[str, Json]


class Shown(NamedTuple):
    """One row for people."""

    custom_id: str
    prompt: str  # what the answer answers; "": nobody can tell
    answer: str  # or why there is none
    accept_length: float | None  # None: no rounds


def first_rows(out: str, limit: int) -> list[Shown]:
    """Show the first rows of an output.

    What was asked is told by the input; where that is gone, by the columns of the output.

    Args:
        out: an output that is there.
        limit: most rows.
    """
    lines = _first_lines(Path(out), limit)
    spec = look(out).spec if RunDir(out).has_output() else Spec(inputs=("-",), out=out)
    items = _first_items(out, spec, len(lines))
    items += [None] * (len(lines) - len(items))
    return [_shown(line, item, spec) for line, item in zip(lines, items, strict=True)]


def _first_lines(out: Path, limit: int) -> Sequence[Row]:
    try:
        lines = _read_lines(out, limit)
    except (ValueError, pa.ArrowInvalid) as error:
        raise UsageError(f"{out}: no output of ours ({error}). Name the --out of a run.") from error
    return lines


def _read_lines(out: Path, limit: int) -> Sequence[Row]:
    if out.suffix not in OUTPUTS:
        raise UsageError(f"{out}: expected an output, which ends in {' or '.join(OUTPUTS)}.")
    if out.suffix == ".jsonl":
        with out.open("rb") as lines:
            return [_parsed(line) for line in islice(lines, limit)]
    with pq.ParquetFile(out) as table:
        batches = table.iter_batches(batch_size=limit)
        return next(batches).to_pylist() if table.metadata.num_rows else []


def _parsed(line: bytes) -> Row:
    found = parse(line)
    if found.problem:
        raise ValueError(found.problem)
    return found.record


def _first_items(out: str, spec: Spec, most: int) -> list[Item | None]:
    """Read the records of the first rows again; none, if the input is not here any more."""
    run_dir = RunDir(out)
    if not run_dir.has_output() or any(name.startswith(hub.SCHEME) for name in spec.inputs):
        return []
    try:
        sources = locate(spec.inputs, run_dir.stdin, run_dir.fetched, spec.id_column)
        return [item_of(each) for each in islice(read(sources, samples=spec.samples), most)]
    except (DsparkBatchError, OSError):  # the rows are worth showing without it
        return []


def _shown(line: Row, item: Item | None, spec: Spec) -> Shown:
    row = _of_response(line) if "response" in line and "custom_id" in line else _of_row(line, spec)
    custom_id = str(row.get("custom_id"))
    is_its = item is not None and item.custom_id == custom_id
    speed = (row.get("metrics") or {}).get("speculative_decoding") or {}
    return Shown(
        custom_id,
        last_question(item.record if is_its else line, spec),
        _answer(row),
        speed.get("mean_acceptance_length"),
    )


def _answer(row: Row) -> str:
    if row.get("error"):
        return f"{row['error'].get('code')}: {row['error'].get('message')}"
    if row.get("completion"):
        return row["completion"]
    return f"(still thinking) {row['reasoning']}" if row.get("reasoning") else ""


def _of_row(line: Row, spec: Spec) -> Row:
    """Give our columns their own names again."""
    names = layout_of(spec).our_names
    return {name: line.get(names[name]) for name in ROW_SCHEMA.names}


def _of_response(line: Row) -> Row:
    """Read a line of the OpenAI format as a row."""
    body = (line["response"] or {}).get("body") or {}
    choice = next(iter(body.get("choices") or []), {})
    message = choice.get("message") or {"content": choice.get("text")}
    return {
        "custom_id": line["custom_id"],
        "completion": message.get("content"),
        "reasoning": message.get("reasoning_content"),
        "error": line.get("error"),
        "metrics": body.get("metrics"),
    }
