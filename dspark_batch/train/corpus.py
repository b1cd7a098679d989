"""What finished runs leave a drafter to learn from: prompts and the target's own answers, as ids.

A row has the ids of its answer; the prompt's are rendered again from the record, as the run did.
Both are streamed into two files, which a training maps into memory.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from dspark_batch.errors import UsageError
from dspark_batch.intake.mapping import Render, to_request
from dspark_batch.intake.reader import item_of
from dspark_batch.output.look import Look
from dspark_batch.record.disk import write_text
from dspark_batch.record.journal import Entry
from dspark_batch.train.batches import Ids, Pair
from dspark_batch.train.measure import ALL, Sample
from dspark_batch.types import Failure, Item, Json

_HELD_OUT = 20  # one record in so many
_LONGEST_PERIOD, _LEAST_REPEATED = 64, 48  # tokens of a loop at an answer's end
_LEAST_ANSWER = 2  # an anchor and a token behind it
_FIELDS = np.dtype(
    [
        ("start", np.int64),  # of the prompt in the file of tokens
        ("prompt", np.int32),  # tokens
        ("answer", np.int32),  # tokens behind the prompt
        ("group", np.int32),  # among the names of groups
        ("held_out", np.bool_),
        ("digest", "S16"),  # of the record
    ]
)


class Rendering(NamedTuple):
    """How a target reads a conversation."""

    render: Render
    context_length: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Answers with their prompts on the disk."""

    tokens: np.ndarray  # [n] int32, mapped from the file
    index: np.ndarray  # [rows], with the fields above
    groups: Sequence[str]
    left_out: Mapping[str, int]  # why -> rows
    runs: Sequence[Mapping[str, Json]]  # what it was gathered from

    @property
    def learnt(self) -> np.ndarray:
        """Rows that training may see, as numbers."""
        return np.flatnonzero(~self.index["held_out"])

    @property
    def held_out(self) -> np.ndarray:
        """Rows that training never sees, in an order that says nothing about them."""
        rows = np.flatnonzero(self.index["held_out"])
        return rows[np.argsort(self.index["digest"][rows], kind="stable")]

    def lengths(self, rows: np.ndarray) -> list[int]:
        """Count the tokens of rows, prompts included."""
        return (self.index["prompt"][rows] + self.index["answer"][rows]).tolist()

    def pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Give a prompt's ids and its answer's."""
        entry = self.index[row]
        middle = entry["start"] + entry["prompt"]
        ids = self.tokens[entry["start"] : middle + entry["answer"]]
        return ids[: entry["prompt"]], ids[entry["prompt"] :]

    def sample(self, row: int) -> Sample:
        """Give a row to measure on."""
        prompt, answer = self.pair(row)
        group = self.groups[self.index["group"][row]]
        return Sample(group, prompt.tolist(), answer.tolist())

    def answered(self, vocab_size: int) -> np.ndarray:
        """Count each token of a vocabulary in the answers that training sees; [V]."""
        counts = np.zeros(vocab_size, np.int64)
        for row in self.learnt:
            np.add.at(counts, self.pair(row)[1], 1)
        return counts

    def seen(self, vocab_size: int) -> np.ndarray:
        """Say of each token of a vocabulary whether it occurs; [V] bool."""
        seen = np.zeros(vocab_size, bool)
        for begin in range(0, len(self.tokens), 1 << 22):
            seen[self.tokens[begin : begin + (1 << 22)]] = True
        return seen


def runs_of(jobs: Sequence[Look]) -> list[dict[str, Json]]:
    """Name the runs, and how much of them there is."""
    return [{"run_id": job.run_id, "rows_bytes": job.run_dir.rows.stat().st_size} for job in jobs]


def is_held_out(digest: str) -> bool:
    """Whether no training sees a record, of this digest."""
    return int.from_bytes(_key(digest)[:8], "big") % _HELD_OUT == 0


def _key(digest: str) -> bytes:
    return sha256(digest.encode()).digest()[:16]


def gather(
    jobs: Sequence[Look], reads: Rendering, folder: Path, *, by: str | None, most_tokens: int
) -> Corpus:
    """Write the answers of runs into a folder, unless an earlier start did, and open them.

    Args:
        jobs: runs of one target.
        reads: how it reads them.
        folder: where the files go.
        by: the input column whose values are measured apart; None: all together.
        most_tokens: of a prompt with its answer; what is longer loses the end of its answer.

    Raises:
        UsageError: there is no answer to learn from, a run has no token ids, or no such column.
    """
    written = folder / "corpus.json"
    if not written.exists():
        _write(jobs, reads, folder, by, most_tokens)
    return _opened(folder, orjson.loads(written.read_bytes()))


def _opened(folder: Path, known: Mapping[str, Any]) -> Corpus:
    tokens = np.memmap(folder / "tokens.bin", np.int32, mode="r")
    index = np.load(folder / "index.npy", allow_pickle=False)
    return Corpus(tokens, index, known["groups"], known["left_out"], known["runs"])


def _write(
    jobs: Sequence[Look], reads: Rendering, folder: Path, by: str | None, most_tokens: int
) -> None:
    entries: list[tuple[object, ...]] = []
    groups: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    with (folder / "tokens.bin").open("wb") as file:
        start = 0
        for name, digest, prompt, answer in _answers(jobs, reads, by, most_tokens, left_out):
            array("i", [*prompt, *answer]).tofile(file)
            group = groups.setdefault(name, len(groups))
            key = _key(digest)
            entries.append((start, len(prompt), len(answer), group, is_held_out(digest), key))
            start += len(prompt) + len(answer)
    index = np.array(entries, _FIELDS)
    _refuse_too_few(index, jobs, left_out)
    if not index["held_out"].any():  # few records: one of them
        index["held_out"] = index["digest"] == np.sort(index["digest"])[0]
    np.save(folder / "index.npy", index)
    known = {"groups": list(groups), "left_out": left_out, "runs": runs_of(jobs)}
    write_text(folder / "corpus.json", orjson.dumps(known, option=orjson.OPT_INDENT_2).decode())


def _refuse_too_few(index: np.ndarray, jobs: Sequence[Look], left_out: Mapping[str, int]) -> None:
    if len(np.unique(index["digest"])) < 2:  # one to learn from, one to measure on
        names = ", ".join(job.run_dir.out.name for job in jobs)
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UsageError(
            f"{names}: {len(index)} answers to learn from, expected those of 2 records or more"
            f"{f' ({why})' if why else ''}. Let the run finish some items, or name other runs."
        )


def _answers(
    jobs: Sequence[Look],
    reads: Rendering,
    by: str | None,
    most_tokens: int,
    left_out: Counter[str],
) -> Iterator[tuple[str, str, Ids, Ids]]:
    """Yield group, digest, prompt and answer of each row that teaches something."""
    for job in jobs:
        with job.rows() as rows:
            for record, entry in rows.recorded():
                found = taught(record, entry, job, reads, most_tokens)
                if isinstance(found, str):
                    left_out[found] += 1
                else:
                    yield group_of(item_of(record), by, job), entry.digest, *found


def taught(
    record: Item | Failure, entry: Entry, job: Look, reads: Rendering, most_tokens: int
) -> Pair | str:
    """Give the ids of a row's last prompt and its answer, or say why it teaches nothing.

    Args:
        record: of the input.
        entry: its line of the journal.
        job: whose line it is.
        reads: how the target reads a conversation.
        most_tokens: of a prompt with its answer; what is longer loses the end of its answer.
    """
    row = entry.row
    if isinstance(record, Failure) or row["status"] != "succeeded":
        return "without an answer"
    answer = row.get("token_ids")
    if answer is None:
        raise UsageError(
            f"{job.run_dir.rows}: the row of {record.where} has no token_ids, which a drafter "
            "learns from. Run the job again with this version."
        )
    if row["finish_reason"] == "scored":
        return "that were given, and not generated"
    if row["finish_reason"] == "length" and repeats_itself(answer):
        return "repeating themselves up to their limit"
    request = to_request(
        record, job.spec, reads.render, reads.context_length, tuple(row["earlier_answers"] or ())
    )
    if isinstance(request, Failure):
        return "whose prompt cannot be rendered"
    answer = answer[: most_tokens - len(request.prompt_ids)]
    if len(request.prompt_ids) + _LEAST_ANSWER > most_tokens:
        return f"whose prompts leave no room in {most_tokens} tokens"
    if len(answer) < _LEAST_ANSWER:
        return "of one token"
    return request.prompt_ids, answer


def group_of(record: Item, by: str | None, job: Look) -> str:
    """Name what an answer is measured with: its value of the column, or all."""
    if by is None:
        return ALL
    if by not in record.record:
        raise UsageError(
            f"--by {by}: {record.where} has no such column. Name a column of every input of "
            f"{job.run_dir.out.name}, or leave --by out."
        )
    return str(record.record[by])


def repeats_itself(answer: Sequence[int]) -> bool:
    """Whether an answer ends in the same few tokens again and again."""
    for period in range(1, _LONGEST_PERIOD + 1):
        repeated = max(_LEAST_REPEATED, 2 * period)
        if len(answer) < repeated + period:
            return False
        if answer[-repeated:] == answer[-repeated - period : -period]:
            return True
    return False
