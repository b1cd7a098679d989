"""Rows as response lines of the OpenAI Batch API."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import accumulate, islice

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
        **_prompt_logprobs(row),
        **_usage_and_metrics(row),
    }


def _completion(head: Mapping[str, Json], row: AnswerRow) -> dict[str, Json]:
    return {
        "id": head["id"],
        "object": "text_completion",
        **head,
        "choices": [_choice(row, "text", row["completion"]) | _prompt_logprobs(row)],
        **_usage_and_metrics(row),
    }


def _choice(row: AnswerRow, name: str, said: Json) -> dict[str, Json]:
    told = row["logprobs"]
    logprobs = None if told is None else logprobs_of(told, is_chat=name == "message")
    return {"index": 0, name: said, "logprobs": logprobs, "finish_reason": row["finish_reason"]}


def logprobs_of(told: LogprobsJson, *, is_chat: bool, offset: int = 0) -> Json:
    """Write log-probabilities as OpenAI's chats have them, or texts that are continued.

    Args:
        told: of an answer, or of a part of it.
        is_chat: which shape.
        offset: characters of the answer before this part.
    """
    if is_chat:
        content: list[Json] = [
            {**_token(token, logprob), "top_logprobs": [_token(*each) for each in top]}
            for token, logprob, top in _by_token(told)
        ]
        return {"content": content, "refusal": None}
    ends = list(accumulate(map(len, told["tokens"]), initial=offset))
    return {
        "tokens": told["tokens"],
        "token_logprobs": told["token_logprobs"],
        "top_logprobs": [dict(reversed(top)) for _, _, top in _by_token(told)],
        "text_offset": ends[:-1],
    }


def _prompt_logprobs(row: AnswerRow) -> dict[str, Json]:
    """Write those of the prompt in vLLM's shape; {}: nobody asked.

    The rank of a token that is none of the likeliest is not known, and so null.
    """
    told = row["prompt_logprobs"]
    if told is None:
        return {}
    ids = list(zip(told["top_ids"], told["top_tokens"], told["top_logprobs"], strict=True))
    num_top = len(ids) // max(1, len(told["tokens"]) - 1)
    pairs = zip(told["token_ids"], told["tokens"], told["token_logprobs"], strict=True)
    entries: list[Json] = [None]  # nothing comes before the first token
    for at, (token, text, logprob) in enumerate(islice(pairs, 1, None)):
        top = ids[at * num_top : (at + 1) * num_top]
        by_id: dict[str, Json] = {str(token): _ranked(text, logprob, None)}
        by_id |= {str(i): _ranked(t, p, rank) for rank, (i, t, p) in enumerate(top, 1)}
        entries.append(by_id)
    return {"prompt_logprobs": entries}


def _ranked(text: str, logprob: float | None, rank: int | None) -> Json:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


def _by_token(told: LogprobsJson) -> Iterator[tuple[str, float | None, list[tuple[str, float]]]]:
    """Give each token with its log-probability and the likeliest ones beside it."""
    beside = list(zip(told["top_tokens"], told["top_logprobs"], strict=True))
    num_top = len(beside) // max(1, len(told["tokens"]))
    pairs = zip(told["tokens"], told["token_logprobs"], strict=True)
    for at, (token, logprob) in enumerate(pairs):
        yield token, logprob, beside[at * num_top : (at + 1) * num_top]


def _token(text: str, logprob: float | None) -> dict[str, Json]:
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
