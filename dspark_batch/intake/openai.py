"""The dialect of the OpenAI Batch API: requests in, response lines out.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

Every field of a body is obeyed, known to change nothing here, or refused; none is ignored.
"""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import accumulate
from typing import NamedTuple

from dspark_batch.intake.choices import CHOICES, ONLY, OTHER_WORDS
from dspark_batch.intake.messages import (
    Conversation,
    Fields,
    Unusable,
    from_text,
    kind_of,
    read_messages,
    unsupported,
)
from dspark_batch.spec.nearest import nearest
from dspark_batch.types import Item, Json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# What they steer is not ours: who asks, who pays, what is kept, which model answers.
HARMLESS = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "parallel_tool_calls", "stream_options", "priority", "request_id"),
)
# How a chat is rendered: whether its last message goes on, and whether the model thinks.
RENDERING = ("continue_final_message", "add_generation_prompt", "chat_template_kwargs")
RENDERING += ("add_special_tokens",)  # besides those of the chat template


class Batched(NamedTuple):
    """What a request asks."""

    conversation: Conversation
    choices: dict[str, Json]  # as in `sampling_params`
    goes_on: bool = False  # with its last message, an assistant's
    template_kwargs: Json = None


def body_of(record: Mapping[str, Json]) -> dict[str, Json] | None:
    """Give the body of a request of this dialect, good or bad; None: the record is none."""
    body = from_text(record.get("body"), "{")
    return body if isinstance(body, dict) else None


def is_text(record: Mapping[str, Json]) -> bool:
    """Whether a record is a request to continue a text, and no chat."""
    body = body_of(record)
    return body is not None and _path(record.get("url"), body) == COMPLETIONS


def request_in(record: Mapping[str, Json], fields: Fields) -> Batched:
    """Read a request.

    Raises:
        Unusable: it asks for what cannot be done here.
    """
    method, url, body = record.get("method"), record.get("url"), body_of(record)
    if method is not None and str(method).upper() != "POST":
        raise Unusable(f"`method` is {method!r}, expected 'POST'.")
    path = _path(url, body)
    if path is None:
        raise Unusable(f"`url` is {url!r}, expected {CHAT} or {COMPLETIONS}.")
    given = fields.given(body)
    is_chat = path == CHAT
    for name in sorted(given.keys() - {"messages" if is_chat else "prompt"}):
        _refuse_unknown(name)
    choices = {name: given[name] for name in (*CHOICES, *OTHER_WORDS, *ONLY) if name in given}
    if not is_chat:
        if given.keys() & RENDERING:
            name = min(given.keys() & RENDERING)
            raise Unusable(f"`body.{name}` is about chats, and this is a text; take it out.")
        return Batched(_text(given), choices)
    if given.get("add_special_tokens", False) is not False:
        raise unsupported("`body`", "add_special_tokens")
    messages = read_messages(given.get("messages"), "body.messages", fields)
    return Batched(messages, choices, _goes_on(given), given.get("chat_template_kwargs"))


def _path(url: Json, body: Mapping[str, Json]) -> str | None:
    """Tell what a request asks for by how its url ends: each service has its own beginning.

    Without a url, as Mistral has it, the body tells. None: something else.
    """
    if url is None:
        return COMPLETIONS if "prompt" in body and "messages" not in body else CHAT
    if not isinstance(url, str):
        return None
    path = url.partition("?")[0].rstrip("/")
    if path.endswith("/chat/completions"):
        return CHAT
    return COMPLETIONS if path.endswith("/completions") else None


def _goes_on(body: Mapping[str, Json]) -> bool:
    """Whether the answer goes on with the last message, in vLLM's words.

    Raises:
        Unusable: the two fields contradict each other.
    """
    goes_on = body.get("continue_final_message", False)
    begins = body.get("add_generation_prompt", not goes_on)
    if not isinstance(goes_on, bool) or begins is not (not goes_on):
        raise Unusable(
            "`body.continue_final_message` and `body.add_generation_prompt` contradict each other; "
            "one is true and the other false."
        )
    return goes_on


def response_line(item: Item, row: Mapping[str, Json], model: str, created: int) -> dict[str, Json]:
    """Write a row as a line of an output file; failures stand in it too, at their place.

    Args:
        item: what was asked.
        row: our columns.
        model: the name of what answered.
        created: seconds since 1970.
    """
    name = sha256(f"{item.index}/{item.custom_id}/{item.digest}".encode()).hexdigest()[:24]
    line = {"id": f"batch_req_{name}", "custom_id": row["custom_id"]}
    if row["status"] != "succeeded":
        return line | {"response": None, "error": row["error"]}
    body = _completion if is_text(item.record) else _chat_completion
    head = {"created": created, "model": model}
    response = {"status_code": 200, "request_id": name, "body": body(name, head, row)}
    return line | {"response": response, "error": None}


def _text(body: Mapping[str, Json]) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise Unusable(f"`body.prompt` is {kind_of(prompt)}, expected a string.")
    if not prompt:
        raise Unusable("`body.prompt` is empty; there is nothing to continue.")
    return prompt


def _refuse_unknown(name: str) -> None:
    known = (*HARMLESS, *CHOICES, *OTHER_WORDS, *ONLY, *RENDERING)
    if name not in known:
        raise Unusable(
            f"`body.{name}` is not supported{nearest(name, known)}. Take it out, or leave it aside "
            f"with --ignore-fields {name}."
        )


def _chat_completion(
    name: str, head: Mapping[str, Json], row: Mapping[str, Json]
) -> dict[str, Json]:
    message = {"role": "assistant", "content": row["completion"]}
    if row["reasoning"] is not None:
        message["reasoning_content"] = row["reasoning"]
    choice = {"index": 0, "message": message, "logprobs": _chat_logprobs(row["logprobs"])}
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        **head,
        "choices": [choice | {"finish_reason": row["finish_reason"]}],
        **_usage_and_metrics(row),
    }


def _completion(name: str, head: Mapping[str, Json], row: Mapping[str, Json]) -> dict[str, Json]:
    choice = {"index": 0, "text": row["completion"], "logprobs": _logprobs(row["logprobs"])}
    return {
        "id": f"cmpl-{name}",
        "object": "text_completion",
        **head,
        "choices": [choice | {"finish_reason": row["finish_reason"]}],
        **_usage_and_metrics(row),
    }


def _chat_logprobs(told: Mapping[str, Json] | None) -> dict[str, Json] | None:
    """Write log-probabilities as chats have them."""
    if told is None:
        return None
    content = [
        _token(token, logprob) | {"top_logprobs": [_token(*each) for each in top]}
        for token, logprob, top in _by_token(told)
    ]
    return {"content": content, "refusal": None}


def _logprobs(told: Mapping[str, Json] | None) -> dict[str, Json] | None:
    """Write log-probabilities as texts that are continued have them."""
    if told is None:
        return None
    ends = list(accumulate(map(len, told["tokens"]), initial=0))
    return {
        "tokens": told["tokens"],
        "token_logprobs": told["token_logprobs"],
        "top_logprobs": [dict(reversed(top)) for _, _, top in _by_token(told)],
        "text_offset": ends[:-1],
    }


def _by_token(told: Mapping[str, Json]) -> Iterator[tuple[str, float, list[tuple[str, float]]]]:
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


def _usage_and_metrics(row: Mapping[str, Json]) -> dict[str, Json]:
    usage, metrics = row["usage"], row["metrics"]
    return {
        "usage": {
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
            "prompt_tokens_details": {"cached_tokens": metrics["cached_tokens"]},
        },
        "metrics": metrics,
    }
