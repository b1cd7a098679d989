"""Conversations as records hold them: chat messages in OpenAI's or ShareGPT's words, or turns."""

from collections.abc import Mapping
from typing import TypeAlias

from dspark_batch.types import Json

Message: TypeAlias = dict[str, str]  # {"role": ..., "content": ...}
Conversation: TypeAlias = list[Message] | str  # str: no chat, but a text to be continued

ROLES = ("system", "user", "assistant")
_ROLE_BY_SPEAKER = {  # ShareGPT's words
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class Unusable(Exception):
    """What is wrong with a record, without saying where."""


def asked(text: str) -> list[Message]:
    """Make a conversation of one question."""
    return [{"role": "user", "content": text}]


def checked_messages(messages: Json, column: str) -> list[Message]:
    """Read a list of messages.

    In ShareGPT's words a last answer is dropped: it is the data set's, and ours takes its place.

    Raises:
        Unusable: it is something else.
    """
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else kind_of(messages)
        raise Unusable(f"`{column}` is {found}, expected a list of messages.")
    if isinstance(messages[0], dict) and "from" in messages[0]:
        said = [_said(message, f"`{column}[{i}]`") for i, message in enumerate(messages)]
        return said[:-1] if len(said) > 1 and said[-1]["role"] == "assistant" else said
    return [_message(message, f"`{column}[{i}]`") for i, message in enumerate(messages)]


def checked_turns(turns: Json, column: str) -> list[str]:
    """Read a list of user texts.

    Raises:
        Unusable: it is something else, or has a text that asks nothing.
    """
    if not isinstance(turns, list) or not turns:
        found = "empty" if turns == [] else kind_of(turns)
        raise Unusable(f"`{column}` is {found}, expected a list of user texts.")
    for i, turn in enumerate(turns):
        if not isinstance(turn, str):
            raise Unusable(f"`{column}[{i}]` is {kind_of(turn)}, expected a string.")
        if not turn:
            raise Unusable(f"`{column}[{i}]` is empty; there is nothing to answer.")
    return turns


def _message(message: Json, where: str) -> Message:
    """Keep role and content of a message; other keys are for other programs."""
    if not isinstance(message, dict):
        raise Unusable(f"{where} is {kind_of(message)}, expected an object with role and content.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Unusable(f"{where} has the role {role!r}, expected one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise Unusable(f"{where} has a content that is {kind_of(content)}, expected a string.")
    return {"role": role, "content": content}


def _said(message: Json, where: str) -> Message:
    if not isinstance(message, dict):
        raise Unusable(f"{where} is {kind_of(message)}, expected an object with from and value.")
    speaker, value = message.get("from"), message.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLE_BY_SPEAKER:
        known = ", ".join(_ROLE_BY_SPEAKER)
        raise Unusable(f"{where} is from {speaker!r}, expected one of {known}.")
    if not isinstance(value, str):
        raise Unusable(f"{where} has a value that is {kind_of(value)}, expected a string.")
    return {"role": _ROLE_BY_SPEAKER[speaker], "content": value}


def listed(columns: Mapping[str, Json]) -> str:
    """List column names for a message."""
    return ", ".join(f"`{name}`" for name in columns) or "none"


def kind_of(value: Json) -> str:
    """Name the JSON type of a value as people say it."""
    names = {
        "NoneType": "null",
        "bool": "a boolean",
        "int": "a number",
        "float": "a number",
        "str": "a string",
        "list": "a list",
        "dict": "an object",
    }
    return names[type(value).__name__]
