"""Rows as response lines of the OpenAI Batch API."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import accumulate

from dspark_batch.intake.openai import is_text
from dspark_batch.record.rows import AnswerRow, LogprobsJson, Row, columns_of
from dspark_batch.types import Item, Json


def response_line(item: Item, row: Row, model: str, created: int) -> dict[str, Json]:
    """Write a row as a line of an output file; failures stand in it too, at their place.

    Args:
        item: what was asked.
        row: our columns.
        model: the name of what answered.
        created: seconds since 1970.
    """
    name = sha256(f"{item.index}/{item.custom_id}/{item.digest}".encode()).hexdigest()[:24]
    line: dict[str, Json] = {"id": f"batch_req_{name}", "custom_id": row["custom_id"]}
    if row["status"] != "succeeded":
        return line | {"response": None, "error": columns_of(row)["error"]}
    kind = "cmpl" if is_text(item.record) else "chatcmpl"
    head: dict[str, Json] = {"id": f"{kind}-{name}", "created": created, "model": model}
    response: Json = {"status_code": 200, "request_id": name, "body": body_of(item, row, head)}
    return line | {"response": response, "error": None}


def body_of(item: Item, row: AnswerRow, head: Mapping[str, Json]) -> dict[str, Json]:
    """Write an answer as the body of a response, whose `id`, `created` and `model` are given."""
    return (_completion if is_text(item.record) else _chat_completion)(head, row)


def _chat_completion(head: Mapping[str, Json], row: AnswerRow) -> dict[str, Json]:
    message: dict[str, Json] = {"role": "assistant", "content": row["completion"]}
    if row["reasoning"] is not None:
        message["reasoning_content"] = row["reasoning"]
    return {
        "id": head["id"],
        "object": "chat.completion",
        **head,
        "choices": [_choice(row, "message", message)],
        **_usage_and_metrics(row),
    }


def _completion(head: Mapping[str, Json], row: AnswerRow) -> dict[str, Json]:
    return {
        "id": head["id"],
        "object": "text_completion",
        **head,
        "choices": [_choice(row, "text", row["completion"])],
        **_usage_and_metrics(row),
    }


def _choice(row: AnswerRow, name: str, said: Json) -> Json:
    told = row["logprobs"]
    shape = _chat_logprobs if name == "message" else _logprobs
    logprobs = None if told is None else shape(told)
    return {"index": 0, name: said, "logprobs": logprobs, "finish_reason": row["finish_reason"]}


def _chat_logprobs(told: LogprobsJson) -> Json:
    """Write log-probabilities as chats have them."""
    content: list[Json] = [
        {**_token(token, logprob), "top_logprobs": [_token(*each) for each in top]}
        for token, logprob, top in _by_token(told)
    ]
    return {"content": content, "refusal": None}


def _logprobs(told: LogprobsJson) -> Json:
    """Write log-probabilities as texts that are continued have them."""
    ends = list(accumulate(map(len, told["tokens"]), initial=0))
    return {
        "tokens": told["tokens"],
        "token_logprobs": told["token_logprobs"],
        "top_logprobs": [dict(reversed(top)) for _, _, top in _by_token(told)],
        "text_offset": ends[:-1],
    }


def _by_token(told: LogprobsJson) -> Iterator[tuple[str, float, list[tuple[str, float]]]]:
    """Give each token with its log-probability and the likeliest ones beside it."""
    beside = list(zip(told["top_tokens"], told["top_logprobs"], strict=True))
    num_top = len(beside) // max(1, len(told["tokens"]))
    pairs = zip(told["tokens"], told["token_logprobs"], strict=True)
    for at, (token, logprob) in enumerate(pairs):
        yield token, logprob, beside[at * num_top : (at + 1) * num_top]


def _token(text: str, logprob: float) -> dict[str, Json]:
    """Describe a token; a part of a character has no bytes that its text could tell."""
    told = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": told}


def _usage_and_metrics(row: AnswerRow) -> dict[str, Json]:
    usage, metrics = row["usage"], row["metrics"]
    return {
        "usage": {
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
            "prompt_tokens_details": {"cached_tokens": metrics["cached_tokens"]},
        },
        "metrics": columns_of(row)["metrics"],
    }
