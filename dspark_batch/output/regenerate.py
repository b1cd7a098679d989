"""Write new answers back into the conversation that they were made for, in its own shape."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from dspark_batch.intake.messages import Fields, from_text, is_assistant, read_messages, words_of
from dspark_batch.intake.question import (
    BODY,
    column_of,
    places_of_answers,
    without_last_answer,
)
from dspark_batch.record.rows import AnswerRow, Row
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Json

_REASONING = ("reasoning_content", "reasoning")
_STALE = ("tool_calls", "function_call", "refusal", "annotations", "audio")  # of the old answer


def written_back(record: Mapping[str, Json], row: Row, spec: Spec) -> Mapping[str, Json]:
    """Put the answers of a row into a record's conversation; one without an answer stays."""
    if spec.regenerate is None or row["status"] != "succeeded":
        return record
    column = column_of(record, spec)
    there: Any = from_text(record[column], "{" if column == BODY else "[")
    if column != BODY:
        return {**record, column: _as_it_was(_answered(there, row, spec), record[column])}
    messages: Any = from_text(there["messages"], "[")
    new = there | {"messages": _as_it_was(_answered(messages, row, spec), there["messages"])}
    return {**record, column: _as_it_was(new, record[column])}


def _as_it_was(value: Json, old: Json) -> Json:
    return orjson.dumps(value).decode() if isinstance(old, str) else value


def _answered(messages: Sequence[Any], row: AnswerRow, spec: Spec) -> list[Json]:
    """Put the answers at their places, in messages that have been read once before."""
    read = read_messages(messages, "", Fields(spec.ignore_fields))
    answers = [*(row["earlier_answers"] or ()), row["completion"]]
    if spec.regenerate == "last":
        messages = messages[: len(without_last_answer(read)) + 1]
        places = [len(without_last_answer(read))]
    else:
        places = list(places_of_answers(read))
    new = list(messages)
    for place, answer in zip(places, answers, strict=True):
        reasoning = row["reasoning"] if place == places[-1] else None
        new[place : place + 1] = [_message(messages, place, answer, reasoning)]
    return new


def _message(
    messages: Sequence[Any], place: int, answer: str, reasoning: str | None
) -> dict[str, Json]:
    """Say an answer as the message that stood there, else as the others of the assistant."""
    others = [message for message in messages if is_assistant(message)]
    role, content = words_of(messages[0])
    word = others[-1][role] if others else {"from": "gpt", "role": "assistant"}[role]
    old = messages[place] if place < len(messages) else {role: word}
    is_parts = isinstance(old.get(content), list)
    new: dict[str, Json] = old | {
        content: [{"type": "text", "text": answer}] if is_parts else answer
    }
    new |= {name: None for name in _STALE if old.get(name)}
    return new | {name: reasoning for name in _REASONING if name in old}
