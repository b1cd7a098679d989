"""What an output record looks like: one fixed schema from the first row on."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import fsum
from typing import Literal, NotRequired, TypeAlias, TypedDict, TypeVar, cast

import pyarrow as pa

from dspark_batch.errors import UsageError
from dspark_batch.spec.spec import Spec
from dspark_batch.types import (
    Completion,
    Failure,
    FinishReason,
    Json,
    Logprobs,
    Outcome,
    StructureKind,
)

T = TypeVar("T")

_TEXTS = pa.list_(pa.field("element", pa.string()))
_NUMBERS = pa.list_(pa.field("element", pa.float64()))
_COUNTS = pa.list_(pa.field("element", pa.int32()))  # the name that Parquet gives it

_LOGPROBS: dict[str, pa.DataType] = {  # natural logarithms; the lists are flat
    "tokens": _TEXTS,
    "token_logprobs": _NUMBERS,
    "top_ids": _COUNTS,  # those of `top` have K entries for each token that something precedes
    "top_tokens": _TEXTS,
    "top_logprobs": _NUMBERS,
    "sum": pa.float64(),
    "mean": pa.float64(),  # null: there is nothing to add up
}

ROW_SCHEMA = pa.schema(
    {
        "custom_id": pa.string(),
        "sample_index": pa.int32(),
        "status": pa.string(),  # succeeded | errored | skipped
        "completion": pa.string(),
        "reasoning": pa.string(),
        "earlier_answers": _TEXTS,  # to the turns before the last; null: there was one turn
        "finish_reason": pa.string(),  # stop | length | scored
        "error": pa.struct({"code": pa.string(), "message": pa.string()}),
        # Of all turns; all else is about the last one.
        "usage": pa.struct({"prompt_tokens": pa.int64(), "completion_tokens": pa.int64()}),
        "token_ids": _COUNTS,  # with the stop token
        "logprobs": pa.struct(_LOGPROBS),  # of `token_ids`; null: nobody asked
        "prompt_logprobs": pa.struct({"token_ids": _COUNTS} | _LOGPROBS),
        "structure": pa.struct(  # null: nobody asked for one
            {
                "kind": pa.string(),  # json_schema | regex | grammar | choice
                "parsed": pa.bool_(),  # is the answer whole? One that max_tokens cut is not
            }
        ),
        "verified": pa.bool_(),  # null: nobody compared it with the baseline
        "input_notes": _TEXTS,  # what was odd in the record, and what was ignored; null: nothing
        "metrics": pa.struct(
            {
                "cached_tokens": pa.int64(),  # of usage.prompt_tokens
                "prefill_s": pa.float64(),
                "decode_s": pa.float64(),
                "tokens_per_s": pa.float64(),  # while decoding: the first token is prefill's
                "fallback": pa.string(),  # why the drafter was given up; null: it was not
                "worker": pa.string(),  # of a fleet, "host:gpu"; null: there was none
                "speculative_decoding": pa.struct(
                    {  # vLLM's names and meanings
                        "mean_acceptance_length": pa.float64(),  # bonus included
                        "draft_acceptance_rate": pa.float64(),  # accepted / really verified
                        "acceptance_histogram": _COUNTS,  # [accepted drafts] -> rounds
                        "num_spec_steps": pa.int64(),
                        "num_accepted_draft_tokens": pa.int64(),
                        "num_draft_tokens": pa.int64(),
                        # Of these two, those that were looked up in prompt and answer.
                        "num_accepted_lookup_tokens": pa.int64(),
                        "num_lookup_tokens": pa.int64(),
                        "per_step_accepted": _COUNTS,
                        "per_step_drafted": _COUNTS,
                        "per_step_confidence": pa.list_(pa.list_(pa.float64())),  # logits
                    }
                ),
            }
        ),
    }
)
"""Our columns, after the input columns. Two outputs are equal when all but `metrics` is equal, and
`verified`, which tells who looked."""


_MOST_DIGITS = 20  # of an integer of 64 bits, its sign included

PARSED = "parsed"
"""The column behind these that a JSON Schema of the whole job adds: the answer as a value."""


class ErrorJson(TypedDict):
    """Why a row has no answer."""

    code: str
    message: str


class Usage(TypedDict):
    """Tokens of all turns."""

    prompt_tokens: int
    completion_tokens: int


class Speculation(TypedDict):
    """How drafts fared in the last turn."""

    mean_acceptance_length: float | None  # None: no rounds
    draft_acceptance_rate: float | None  # None: no drafts
    acceptance_histogram: Sequence[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_accepted_lookup_tokens: int  # of these two, those that were looked up
    num_lookup_tokens: int
    per_step_accepted: Sequence[int]
    per_step_drafted: Sequence[int]
    per_step_confidence: Sequence[Sequence[float]] | None  # None: not logged


class LogprobsJson(TypedDict):
    """Log-probabilities of tokens; flat lists."""

    token_ids: NotRequired[Sequence[int]]  # of a prompt; an answer's have a column of their own
    tokens: Sequence[str]
    token_logprobs: Sequence[float | None]  # None: the first of a prompt
    top_ids: Sequence[int]
    top_tokens: Sequence[str]
    top_logprobs: Sequence[float]
    sum: float
    mean: float | None  # None: there is nothing to add up


class StructureJson(TypedDict):
    """How an answer met the structure that it was asked for."""

    kind: StructureKind
    parsed: bool


class Metrics(TypedDict):
    """How an answer was made."""

    cached_tokens: int
    prefill_s: float
    decode_s: float
    tokens_per_s: float | None  # None: it had one token
    fallback: str | None
    worker: str | None
    speculative_decoding: Speculation


class AnswerRow(TypedDict):
    """A row with an answer."""

    custom_id: str
    sample_index: int
    status: Literal["succeeded"]
    completion: str
    reasoning: str | None
    earlier_answers: Sequence[str] | None
    finish_reason: FinishReason
    error: None
    usage: Usage
    token_ids: Sequence[int]
    logprobs: LogprobsJson | None  # None: nobody asked
    prompt_logprobs: LogprobsJson | None
    structure: StructureJson | None  # None: nobody asked
    verified: bool | None
    input_notes: Sequence[str] | None
    metrics: Metrics


class FailureRow(TypedDict):
    """A row without one."""

    custom_id: str
    sample_index: int
    status: Literal["errored", "skipped"]
    completion: None
    reasoning: None
    earlier_answers: None
    finish_reason: None
    error: ErrorJson
    usage: None
    token_ids: None
    logprobs: None
    prompt_logprobs: None
    structure: None
    verified: None
    input_notes: Sequence[str] | None
    metrics: None


Row: TypeAlias = AnswerRow | FailureRow
"""Our columns, by the names of the schema."""


def row_of(outcome: Outcome) -> Row:
    """Write an outcome as our columns, in the order of the schema."""
    return _failure_row(outcome) if isinstance(outcome, Failure) else answer_row(outcome)


def _failure_row(failure: Failure) -> FailureRow:
    return {
        "custom_id": failure.item.custom_id,
        "sample_index": failure.item.sample_index,
        "status": "skipped" if failure.is_skipped else "errored",
        "completion": None,
        "reasoning": None,
        "earlier_answers": None,
        "finish_reason": None,
        "error": {"code": failure.code, "message": failure.message},
        "usage": None,
        "token_ids": None,
        "logprobs": None,
        "prompt_logprobs": None,
        "structure": None,
        "verified": None,
        "input_notes": list(failure.item.notes) or None,
        "metrics": None,
    }


def answer_row(completion: Completion) -> AnswerRow:
    """Write an answer as our columns, in the order of the schema."""
    structured = completion.structure
    return {
        "custom_id": completion.item.custom_id,
        "sample_index": completion.item.sample_index,
        "status": "succeeded",
        "completion": completion.text,
        "reasoning": completion.reasoning,
        "earlier_answers": [turn.text for turn in completion.earlier] or None,
        "finish_reason": completion.finish_reason,
        "error": None,
        "usage": {
            "prompt_tokens": sum(turn.prompt_tokens for turn in completion.turns),
            "completion_tokens": completion.num_generated,
        },
        "token_ids": list(completion.token_ids),
        "logprobs": of_answer(completion.logprobs),
        "prompt_logprobs": of_prompt(completion.prompt_logprobs),
        "structure": None
        if structured is None
        else {"kind": structured[0], "parsed": structured[1]},
        "verified": completion.verified,
        "input_notes": list(completion.item.notes) or None,
        "metrics": _metrics(completion),
    }


def parsed_in(row: Row) -> Json:
    """Give the value of an answer that is whole; None: it is not, or nobody asked for JSON."""
    structure = row["structure"]
    if structure is None or structure["kind"] != "json_schema" or not structure["parsed"]:
        return None
    try:
        value: Json = json.loads(row["completion"] or "null", parse_int=_number)
    except (ValueError, RecursionError):
        return None
    return value


def _number(digits: str) -> float:
    """Read an integer; one beyond 64 bits, which no column can hold, as a double."""
    number = int(digits) if len(digits) <= _MOST_DIGITS else math.inf
    return number if -(1 << 63) <= number < 1 << 63 else float(digits)


def columns_of(row: Row) -> Mapping[str, Json]:
    """See a row as any other mapping to JSON."""
    return cast("Mapping[str, Json]", row)  # no checker takes a TypedDict for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which columns an output has, and what they are called."""

    output_prefix: str = ""  # before each of our names
    output_column: str | None = None  # the whole name of the completion; None: as the others
    keep: tuple[str, ...] = ()  # the only input columns; (): all
    drop: tuple[str, ...] = ()  # input columns to leave out
    id_column: str | None = None  # the input column that `custom_id` comes from; None: `custom_id`
    score: str | None = None  # the input column that the completion comes from; None: it has none
    json_schema: str | None = None  # of the column `parsed`; None: there is none

    @property
    def our_names(self) -> Mapping[str, str]:
        """Map each of our columns to its name in the output."""
        return _our_names(self)

    def clashes(self, columns: Iterable[str]) -> set[str]:
        """Find the input columns that would share a name with one of ours.

        Without a prefix an input `custom_id` is no clash if ours comes from it, and so with the
        completion.
        """
        names = list(self.our_names.values())
        shared = {name for name in columns if self.has(name) and name in names}
        if self.our_names["completion"] == self.score:
            shared.discard(self.score)
        return shared if self.output_prefix else shared - {self.id_column or "custom_id"}

    def passed_through(self, record: Mapping[str, T]) -> dict[str, T]:
        """Select the input columns that stand before ours in the output."""
        ours = self.our_names.values()
        return {name: v for name, v in record.items() if self.has(name) and name not in ours}

    def has(self, column: str) -> bool:
        """Whether an input column is not left out."""
        return column not in self.drop and (not self.keep or column in self.keep)


@cache  # every row asks
def _our_names(layout: Layout) -> Mapping[str, str]:
    ours = [*ROW_SCHEMA.names, PARSED] if layout.json_schema else ROW_SCHEMA.names
    names = {name: layout.output_prefix + name for name in ours}
    return names | ({"completion": layout.output_column} if layout.output_column else {})


def layout_of(spec: Spec) -> Layout:
    """Say what columns the output of a job has.

    Raises:
        UsageError: two of ours would have the same name.
    """
    layout = Layout(**{field.name: getattr(spec, field.name) for field in fields(Layout)})
    if len(set(layout.our_names.values())) < len(layout.our_names):
        raise UsageError(
            f"--output-column {spec.output_column} is another of our columns; take another name."
        )
    return layout


def _metrics(completion: Completion) -> Metrics:
    decoded = len(completion.token_ids) - 1  # the first token comes from prefill
    return {
        "cached_tokens": sum(turn.cached_tokens for turn in completion.turns),
        "prefill_s": completion.prefill_s,
        "decode_s": completion.decode_s,
        "tokens_per_s": ratio(decoded, completion.decode_s),
        "fallback": completion.fallback,
        "worker": completion.worker,
        "speculative_decoding": _speculative_decoding(completion),
    }


def _speculative_decoding(completion: Completion) -> Speculation:
    rounds = len(completion.accept_lengths)
    accepted, drafted = sum(completion.num_accepted), sum(completion.num_drafted)
    looked_up, accepted_look_ups = completion.looked_up
    histogram = Counter(completion.num_accepted)
    return {
        "mean_acceptance_length": ratio(sum(completion.accept_lengths), rounds),
        "draft_acceptance_rate": ratio(accepted, drafted),
        "acceptance_histogram": [histogram[n] for n in range(max(histogram, default=-1) + 1)],
        "num_spec_steps": rounds,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_accepted_lookup_tokens": accepted_look_ups,
        "num_lookup_tokens": looked_up,
        "per_step_accepted": list(completion.num_accepted),
        "per_step_drafted": list(completion.num_drafted),
        "per_step_confidence": _logits(completion.confidence),
    }


def _logits(confidence: tuple[tuple[float, ...], ...] | None) -> list[list[float]] | None:
    """Round to what a row has room for; None: not logged."""
    if confidence is None:
        return None
    return [[round(logit, 4) for logit in drafts] for drafts in confidence]


def of_answer(logprobs: Logprobs | None) -> LogprobsJson | None:
    """Round logarithms to what float32 knows of them; None: nobody asked."""
    if logprobs is None:
        return None
    told = [None if each is None else round(each, 6) for each in logprobs.token_logprobs]
    total, mean = sum_and_mean(told)
    return {
        "tokens": list(logprobs.tokens),
        "token_logprobs": told,
        "top_ids": list(logprobs.top_ids),
        "top_tokens": list(logprobs.top_tokens),
        "top_logprobs": [round(each, 6) for each in logprobs.top_logprobs],
        "sum": total,
        "mean": mean,
    }


def of_prompt(logprobs: Logprobs | None) -> LogprobsJson | None:
    """Write the log-probabilities of a prompt, with its ids, which no other column has."""
    told = of_answer(logprobs)
    if logprobs is None or told is None:
        return None
    return {"token_ids": list(logprobs.token_ids), **told}


def sum_and_mean(token_logprobs: Sequence[float | None]) -> tuple[float, float | None]:
    """Add up the log-probabilities that a row tells; the mean of nothing is None."""
    there = [each for each in token_logprobs if each is not None]
    total = fsum(there)
    return round(total, 6), round(total / len(there), 6) if there else None


def committed_in(row: AnswerRow) -> int:
    """Count the tokens that the rounds of an answer committed: the first is prefill's."""
    return 0 if row["finish_reason"] == "scored" else len(row["token_ids"]) - 1


def ratio(part: float, whole: float) -> float | None:
    """Divide; None: there is no whole."""
    return part / whole if whole else None
