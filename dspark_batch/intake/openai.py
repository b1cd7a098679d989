"""The requests of the OpenAI Batch API. `output/responses.py` writes what answers them.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

Every field of a body is obeyed, known to change nothing here, or refused; none is ignored.
"""

from collections.abc import Mapping
from typing import NamedTuple

from dspark_batch.intake.choices import CHOICES, ONLY, OTHER_WORDS
from dspark_batch.intake.json_text import kind_of
from dspark_batch.intake.messages import (
    Conversation,
    Fields,
    Unusable,
    from_text,
    read_messages,
    unsupported,
)
from dspark_batch.spec.nearest import nearest
from dspark_batch.types import Json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# What they steer is not ours: who asks, who pays, what is kept, which model answers.
HARMLESS = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "parallel_tool_calls", "stream_options", "priority", "request_id"),
)
# How a chat is rendered: whether its last message goes on, and whether the model thinks.
RENDERING: tuple[str, ...] = (
    "continue_final_message",
    "add_generation_prompt",
    "chat_template_kwargs",
)
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
    path = _path(url, body) if body is not None else None
    if body is None or path is None:
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
