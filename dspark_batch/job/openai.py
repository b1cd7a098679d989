"""The dialect of the OpenAI Batch API: requests in, response lines out.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

Every field of a body is obeyed, known to change nothing here, or refused; none is ignored.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import NamedTuple

from dspark_batch.job.messages import Conversation, Message, Unusable, checked_messages, kind_of
from dspark_batch.job.nearest import nearest
from dspark_batch.types import Item, Json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# What they steer is not ours: who asks, who pays, what is kept, which model answers.
HARMLESS = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "parallel_tool_calls"),
)
CHOICES = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens")
ONLY = {  # fields with one value that asks for nothing that we lack
    **{"n": 1, "stream": False, "logprobs": False, "response_format": {"type": "text"}},
    **{"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "modalities": ["text"]},
    **{"tools": [], "tool_choice": "none", "echo": False, "best_of": 1, "suffix": ""},
}
_NEW_MAX_TOKENS = "max_completion_tokens"


class Batched(NamedTuple):
    """What a request asks."""

    conversation: Conversation
    choices: dict[str, Json]  # as in `sampling_params`


def is_request(record: Mapping[str, Json]) -> bool:
    """Whether a record is a request of this dialect, good or bad."""
    return isinstance(record.get("body"), dict)


def request_in(record: Mapping[str, Json]) -> Batched:
    """Read a request.

    Raises:
        Unusable: it asks for what cannot be done here.
    """
    method, url, body = record.get("method"), record.get("url"), record["body"]
    if method not in (None, "POST"):
        raise Unusable(f"`method` is {method!r}, expected 'POST'.")
    if url not in (CHAT, COMPLETIONS):
        raise Unusable(f"`url` is {url!r}, expected {CHAT} or {COMPLETIONS}.")
    given = {name: value for name, value in body.items() if value is not None}
    conversation = _chat(given) if url == CHAT else _text(given)
    rest = given.keys() - {"messages" if url == CHAT else "prompt"}
    for name in sorted(rest):
        _refuse_unknown(name, given[name])
    choices = {name: given[name] for name in CHOICES if name in given}
    return Batched(conversation, choices | _limit(given))


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
    body = _completion if item.record.get("url") == COMPLETIONS else _chat_completion
    head = {"created": created, "model": model}
    response = {"status_code": 200, "request_id": name, "body": body(name, head, row)}
    return line | {"response": response, "error": None}


def _chat(body: Mapping[str, Json]) -> list[Message]:
    messages = body.get("messages")
    if isinstance(messages, list):
        messages = [_plain(message, f"`body.messages[{i}]`") for i, message in enumerate(messages)]
    return checked_messages(messages, "body.messages")


def _plain(message: Json, where: str) -> Json:
    """Bring a message to role and content, refusing what that would lose."""
    if not isinstance(message, dict):
        return message
    given = {name: value for name, value in message.items() if value is not None}
    for name in given.keys() - {"role", "content"}:
        raise Unusable(f"{where} has `{name}`, which is not supported.")
    if given.get("role") == "developer":
        given["role"] = "system"
    if isinstance(given.get("content"), list):
        given["content"] = "".join(_part(part, where) for part in given["content"])
    return given


def _part(part: Json, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = part.get("type") if isinstance(part, dict) else kind_of(part)
    raise Unusable(f"{where} has a part that is {found}; only text is supported.")


def _text(body: Mapping[str, Json]) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise Unusable(f"`body.prompt` is {kind_of(prompt)}, expected a string.")
    if not prompt:
        raise Unusable("`body.prompt` is empty; there is nothing to continue.")
    return prompt


def _refuse_unknown(name: str, value: Json) -> None:
    if name in (*HARMLESS, *CHOICES, _NEW_MAX_TOKENS):
        return
    if name not in ONLY:
        known = (*HARMLESS, *CHOICES, *ONLY, _NEW_MAX_TOKENS)
        raise Unusable(f"`body.{name}` is not supported{nearest(name, known)}.")
    only = ONLY[name]
    if value != only or isinstance(value, bool) != isinstance(only, bool):
        instead = " Use --samples for several answers." if name == "n" else ""
        raise Unusable(f"`body.{name}` is {value!r}, which is not supported.{instead}")


def _limit(body: Mapping[str, Json]) -> dict[str, Json]:
    """Take the newer name of `max_tokens` for the same thing."""
    if _NEW_MAX_TOKENS not in body:
        return {}
    limit = body[_NEW_MAX_TOKENS]
    if body.get("max_tokens", limit) != limit:
        raise Unusable(f"`body.max_tokens` and `body.{_NEW_MAX_TOKENS}` differ; keep one of them.")
    return {"max_tokens": limit}


def _chat_completion(
    name: str, head: Mapping[str, Json], row: Mapping[str, Json]
) -> dict[str, Json]:
    message = {"role": "assistant", "content": row["completion"]}
    if row["reasoning"] is not None:
        message["reasoning_content"] = row["reasoning"]
    choice = {"index": 0, "message": message, "logprobs": None}
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        **head,
        "choices": [choice | {"finish_reason": row["finish_reason"]}],
        **_usage_and_metrics(row),
    }


def _completion(name: str, head: Mapping[str, Json], row: Mapping[str, Json]) -> dict[str, Json]:
    choice = {"index": 0, "text": row["completion"], "logprobs": None}
    return {
        "id": f"cmpl-{name}",
        "object": "text_completion",
        **head,
        "choices": [choice | {"finish_reason": row["finish_reason"]}],
        **_usage_and_metrics(row),
    }


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
