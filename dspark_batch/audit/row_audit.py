"""What is wrong with one row, from the row and its record alone: nothing is decoded again."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from dspark_batch.audit.replay import first_difference
from dspark_batch.intake.mapping import Render, said_in, to_request
from dspark_batch.intake.question import num_turns
from dspark_batch.intake.reader import item_of
from dspark_batch.record.rows import (
    ROW_SCHEMA,
    AnswerRow,
    FailureRow,
    LogprobsJson,
    Metrics,
    Row,
    Speculation,
    columns_of,
    parsed_in,
    sum_and_mean,
)
from dspark_batch.spec.spec import Spec
from dspark_batch.types import OF_THE_RECORD, Failure, Given, Item, Request, Said

_OF_AN_ANSWER = ("completion", "finish_reason", "usage", "token_ids", "metrics")
_COUNTS = (
    *("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens"),
    "acceptance_histogram",
)
_CLOSE = 1e-9  # relative, between means and rates that are computed in one order and the other


class Reading(NamedTuple):
    """What must be known of a job and its target to check a row."""

    spec: Spec
    render: Render
    context_length: int
    decode: Callable[[Sequence[int]], str]
    stop_ids: frozenset[int]  # end any answer
    split: Callable[[str], Said]  # tells reasoning and answer apart

    def asked(self, item: Item, earlier: Sequence[str] = ()) -> Request | Failure:
        """Map an item as the run did."""
        return to_request(item, self.spec, self.render, self.context_length, earlier)

    def said(self, item: Item, text: str) -> Said:
        """Split an answer as the run did; a text that is continued has no reasoning."""
        return said_in(text, item.record, self.spec, self.split)


def row_problems(record: Item | Failure, row: Row, reading: Reading) -> Iterator[str]:
    """Say what about a row that `misfit` passes does not agree with its record, or with itself."""
    item = item_of(record)
    if row["custom_id"] != item.custom_id:
        yield f"custom_id is {row['custom_id']!r}, expected {item.custom_id!r}"
    if row["sample_index"] != item.sample_index:
        yield f"sample_index is {row['sample_index']!r}, expected {item.sample_index!r}"
    asked = _turns_asked(record, row["earlier_answers"] or (), reading)
    if row["status"] != "succeeded":
        yield from _problems_of_failure(item, asked[0], row, reading)
    elif refused := next((turn for turn in asked if isinstance(turn, Failure)), None):
        yield f"has an answer, but its record cannot be asked: {refused.message}"
    else:
        requests = [turn for turn in asked if isinstance(turn, Request)]
        yield from _problems_of_answer(requests, row, reading)
    if row["verified"] is False:
        yield "verified is false: the run itself found that plain decoding gives another answer"


def _turns_asked(
    record: Item | Failure, earlier: Sequence[str], reading: Reading
) -> list[Request | Failure]:
    """Map a record as the run did, each turn behind the answers that the row has."""
    if isinstance(record, Failure):
        return [record]
    return [reading.asked(record, earlier[:turn]) for turn in range(len(earlier) + 1)]


def misfit(row: Row) -> str | None:
    """Say why a row cannot be read as one of ours; None: it can."""
    if list(row) != ROW_SCHEMA.names:
        return f"has the columns {', '.join(row)}, expected {', '.join(ROW_SCHEMA.names)}"
    try:
        pa.RecordBatch.from_pylist([dict(row)], ROW_SCHEMA)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        return f"does not fit the schema of a row ({error})"
    if row["status"] not in ("succeeded", "errored", "skipped"):
        return f"status is {row['status']!r}, expected succeeded, errored or skipped"
    ours = columns_of(row)
    missing = [name for name in _OF_AN_ANSWER if ours[name] is None]
    if row["status"] == "succeeded":
        missing += [] if missing else _missing_counts(row)
        return f"is an answer without {missing[0]}" if missing else None
    if row["error"] is None or len(missing) < len(_OF_AN_ANSWER):
        return f"is {row['status']}, but has an answer or no error"
    return None


def _missing_counts(row: AnswerRow) -> list[str]:
    """List what every answer counts and this one does not."""
    told: Mapping[str, object] = row["metrics"].get("speculative_decoding") or {}
    usage: Mapping[str, object] = row["usage"]
    return [name for name in _COUNTS if told.get(name) is None] + [
        name for name in ("prompt_tokens", "completion_tokens") if usage.get(name) is None
    ]


def _problems_of_failure(
    item: Item, asked: Request | Failure, row: FailureRow, reading: Reading
) -> Iterator[str]:
    """Compare a failure with what mapping the record gives now."""
    found = {"code": row["error"]["code"], "message": row["error"]["message"]}
    if isinstance(asked, Failure):
        status = "skipped" if asked.is_skipped else "errored"
        if row["status"] != status:
            yield f"status is {row['status']!r}, expected {status!r}"
        if found != {"code": asked.code, "message": asked.message}:
            yield f"error is {found['code']}: {found['message']}, expected {asked.message}"
    elif found["code"] in OF_THE_RECORD and num_turns(item.record, reading.spec) == 1:
        yield f"failed with {found['code']}, but its record can be asked"


def _problems_of_answer(
    asked: Sequence[Request], row: AnswerRow, reading: Reading
) -> Iterator[str]:
    ids, usage, request = row["token_ids"], row["usage"], asked[-1]
    turns = num_turns(request.item.record, reading.spec)
    if len(asked) != turns:
        yield f"answers {len(asked)} turns, expected {turns}"
    prompt_tokens = sum(len(turn.prompt_ids) for turn in asked)
    if usage["prompt_tokens"] != prompt_tokens:
        yield f"prompt_tokens is {usage['prompt_tokens']}, expected {prompt_tokens}"
    yield from _problems_of_count(asked[:-1], len(ids), usage["completion_tokens"])
    if len(ids) > request.max_tokens:
        yield f"goes on past max_tokens: {len(ids)} tokens, at most {request.max_tokens}"
    yield from _problems_of_logprobs(request, row)
    if request.given is not None:
        yield from _problems_of_given(request.given, row)
    elif ids:
        yield from _problems_of_text(request, row, reading)
        yield from _problems_of_structure(request, row)
        yield from _problems_of_statistics(len(ids), row["metrics"], usage["prompt_tokens"])
    else:
        yield "is an answer without a token"


def _problems_of_count(earlier: Sequence[Request], tokens: int, counted: int) -> Iterator[str]:
    """Bound the tokens of all turns: of the earlier ones the row keeps no tokens."""
    least = tokens + len(earlier)
    most = tokens + sum(turn.max_tokens for turn in earlier)
    if not least <= counted <= most:
        expected = f"{least}" if least == most else f"{least} to {most}"
        yield f"completion_tokens is {counted}, expected {expected}"


def _problems_of_text(request: Request, row: AnswerRow, reading: Reading) -> Iterator[str]:
    """Decode the tokens and end the answer again."""
    ids, stops = row["token_ids"], request.sampling.stop
    stop_ids, least = request.sampling.endings(reading.stop_ids), request.sampling.min_tokens
    past = next((i for i, token in enumerate(ids[:-1]) if token in stop_ids), None)
    if past is not None:
        yield f"goes on past its stop token {ids[past]} at answer token {past}"
    try:
        spoken = reading.decode(ids[:-1] if ids[-1] in stop_ids else ids)
        before = reading.decode(ids[:-1])
        said_least = len(reading.decode(ids[:least])) if least else 0
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        yield f"token_ids decode to nothing ({type(error).__name__}: {error})"
        return
    if _cut(before, stops, said_least) != before:
        yield "goes on past its stop text"
    text = _cut(spoken, stops, said_least)
    said = reading.said(request.item, text)
    for name, told, expected in (
        ("completion", row["completion"], said.answer),
        ("reasoning", row["reasoning"], said.reasoning),
    ):
        if told != expected:
            yield f"{name} is not what token_ids decode to: {_apart(told, expected)}"
    has_stopped = ids[-1] in stop_ids or text != spoken
    if has_stopped and len(ids) <= least:
        yield f"stops after {len(ids)} tokens, expected more than min_tokens, {least}"
    yield from _problems_of_end(request, row, has_stopped)


def _problems_of_given(given: Given, row: AnswerRow) -> Iterator[str]:
    """Compare the answer of a row that was scored with its record's."""
    expected = {"completion": given.text, "token_ids": list(given.token_ids)}
    for name, value in (expected | {"finish_reason": "scored", "reasoning": None}).items():
        if columns_of(row)[name] != value:
            yield f"{name} is not that of the record, whose answer was given"
    if row["metrics"]["speculative_decoding"]["num_spec_steps"]:
        yield "has rounds, but its answer was given"


def _problems_of_logprobs(request: Request, row: AnswerRow) -> Iterator[str]:
    """Count the log-probabilities and add them up; the replay computes them again."""
    sampling, ids = request.sampling, row["token_ids"]
    yield from _problems_of_counts("logprobs", sampling.logprobs, row["logprobs"], len(ids), 0)
    told, num_tokens = row["prompt_logprobs"], len(request.prompt_ids)
    yield from _problems_of_counts("prompt_logprobs", sampling.prompt_logprobs, told, num_tokens, 1)
    if told is not None and list(told.get("token_ids") or ()) != list(request.prompt_ids):
        yield "prompt_logprobs.token_ids are not those of the prompt"


def _problems_of_counts(
    column: str, num_top: int | None, told: LogprobsJson | None, tokens: int, without: int
) -> Iterator[str]:
    """Check one column of log-probabilities; the first `without` tokens have none."""
    if (num_top is None) != (told is None):
        yield f"{column} is {'null' if told is None else 'not null'}, expected the other"
    if num_top is None or told is None:
        return
    tops = (tokens - without) * num_top
    counts = {"tokens": tokens, "token_logprobs": tokens}
    counts |= {"top_ids": tops, "top_tokens": tops, "top_logprobs": tops}
    found = {name: len(values) for name, values in told.items() if isinstance(values, list)}
    for name, expected in counts.items():
        if found.get(name) != expected:
            yield f"{column}.{name} has {found.get(name)} entries, expected {expected}"
    logprobs = told["token_logprobs"]
    if any((logprob is None) != (at < without) for at, logprob in enumerate(logprobs)):
        yield f"{column}.token_logprobs is null elsewhere than for its first {without} tokens"
    elif any(logprob is not None and logprob > 0 for logprob in logprobs):
        yield f"{column}.token_logprobs has one above 0"
    elif (told.get("sum"), told.get("mean")) != sum_and_mean(logprobs):
        yield f"{column}.sum or mean is not that of its token_logprobs"


def _problems_of_structure(request: Request, row: AnswerRow) -> Iterator[str]:
    """Compare what the row says of the answer's structure with the answer."""
    asked, told = request.sampling.structure, row["structure"]
    kinds = asked and asked.kind, told and told["kind"]
    if kinds[0] != kinds[1]:
        yield f"structure.kind is {kinds[1]!r}, expected {kinds[0]!r}"
    should_parse = told and told["kind"] == "json_schema" and told["parsed"]
    if should_parse and parsed_in(row) is None and row["completion"] != "null":
        yield "structure.parsed is true, but the completion is no JSON"


def _problems_of_end(request: Request, row: AnswerRow, has_stopped: bool) -> Iterator[str]:
    reason = "stop" if has_stopped else "length"
    if row["finish_reason"] != reason:
        yield f"finish_reason is {row['finish_reason']!r}, expected {reason!r}"
    if not has_stopped and len(row["token_ids"]) < request.max_tokens:
        yield (
            f"ends after {len(row['token_ids'])} tokens without a stop, expected "
            f"{request.max_tokens}"
        )


def _problems_of_statistics(tokens: int, metrics: Metrics, prompt_tokens: int) -> Iterator[str]:
    """Add up what the row tells of its rounds."""
    if not 0 <= (metrics["cached_tokens"] or 0) <= prompt_tokens:
        yield f"cached_tokens is {metrics['cached_tokens']} of {prompt_tokens} prompt tokens"
    told = metrics["speculative_decoding"]
    rounds, histogram = told["num_spec_steps"], told["acceptance_histogram"]
    accepted, drafted = told["num_accepted_draft_tokens"], told["num_draft_tokens"]
    mean = told["mean_acceptance_length"] or 0.0
    if not _is_close(1 + mean * rounds, tokens):
        yield f"1 + the sum of accept lengths is {1 + mean * rounds:g}, expected {tokens} tokens"
    # The last round may be cut behind its drafts, and then it has no bonus.
    if accepted + rounds + 1 - tokens not in ((0, 1) if rounds else (0,)):
        yield f"{accepted} accepted drafts in {rounds} rounds do not make {tokens} tokens"
    if sum(histogram) != rounds or sum(n * at for n, at in enumerate(histogram)) != accepted:
        yield f"acceptance_histogram {histogram} is not of {rounds} rounds and {accepted} drafts"
    if accepted > drafted or not _is_close(
        (told["draft_acceptance_rate"] or 0) * drafted, accepted
    ):
        yield f"draft_acceptance_rate is not {accepted} of {drafted}"
    yield from _problems_of_lists(told, rounds, drafted, histogram)


def _problems_of_lists(
    told: Speculation, rounds: int, drafted: int, histogram: Sequence[int]
) -> Iterator[str]:
    """Compare the lists by round, where the row has them, with the sums."""
    per_accepted, per_drafted = told.get("per_step_accepted"), told.get("per_step_drafted")
    if per_accepted is None or per_drafted is None:
        return
    counted = Counter(per_accepted)
    if [counted[n] for n in range(max(counted, default=-1) + 1)] != list(histogram):
        yield f"acceptance_histogram is {histogram}, but per_step_accepted is {per_accepted}"
    if len(per_drafted) != rounds or sum(per_drafted) != drafted:
        yield f"per_step_drafted {per_drafted} is not of {rounds} rounds and {drafted} drafts"
    elif any(a > d for a, d in zip(per_accepted, per_drafted, strict=False)):
        yield "a round accepted more drafts than it verified"


def _cut(text: str, stops: Sequence[str], start: int) -> str:
    """Cut a text before its earliest stop text that ends behind `start` characters, if any."""
    found = (text.find(stop, max(0, start + 1 - len(stop))) for stop in stops)
    return text[: min((at for at in found if at >= 0), default=None)]


def _apart(a: str | None, b: str | None) -> str:
    """Quote two texts where they part; None: there is no text."""
    if a is None or b is None:
        return f"{a!r} and not {b!r}"
    at = first_difference(a, b)
    begin = max(0, at - 10)
    return f"{a[begin : at + 20]!r} and not {b[begin : at + 20]!r}, at character {at}"


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= _CLOSE * max(1.0, abs(a), abs(b))
