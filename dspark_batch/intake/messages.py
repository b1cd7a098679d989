"""Conversations as records hold them: messages in OpenAI's or ShareGPT's words, or turns.

One rule for every dialect: what a message says is handed on, known to change nothing, or refused.
"""

from collections.abc import Collection, Mapping
from typing import TypeAlias

import orjson

from dspark_batch.intake.json_text import keys_twice, kind_of, said_twice
from dspark_batch.types import Json

Message: TypeAlias = dict[str, str]  # role, content; where given: name, reasoning_content
Conversation: TypeAlias = list[Message] | str  # str: no chat, but a text to be continued

ROLES = ("system", "user", "assistant")
_ROLE_BY_WORD = {
    **{role: role for role in ROLES},
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("bing", "bard", "claude"), "assistant"),
}
_OF_TOOLS = ("tool", "function", "function_call", "tool_call", "tool_response", "observation")
_TOOL_FIELDS = ("tools", "functions")  # beside a conversation: definitions of tools

# Fields of a message that ask for more than its text.
_MORE: tuple[str, ...] = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "refusal",
    "audio",
    "image",
    "images",
)
_MORE += ("image_url", "video", "videos", "file", "files", "documents")
_MORE += (*_TOOL_FIELDS, "function_calls", "tool_responses")  # a message of Kimi or OLMo has them
_REASONING = ("reasoning_content", "reasoning")  # in vLLM's older and newer words
CONTINUED = ("prefix", "partial")  # Mistral's and others' words for: go on with this message
_HARMLESS = ("annotations", "cache_control", "id", "index", "weight")  # to who reads it, not asks
_TEXT_PARTS = (None, "text", "input_text", "output_text")


class Unusable(Exception):
    """What is wrong with a record, without saying where."""


class Fields:
    """Takes the objects of one record apart, without what a person chose to ignore."""

    def __init__(self, ignore: Collection[str] = ()) -> None:
        self._ignore = frozenset(ignore)
        self.ignored: dict[str, None] = {}  # names that were there; a set that keeps its order

    def given(self, fields: Mapping[str, Json]) -> dict[str, Json]:
        """Select the fields that say something: a null is as if it were not there."""
        there = {name: value for name, value in fields.items() if value is not None}
        self.ignored |= dict.fromkeys(name for name in there if name in self._ignore)
        return {name: value for name, value in there.items() if name not in self._ignore}


def unsupported(where: str, name: str, found: str = "") -> Unusable:
    """Say that a field asks for what cannot be done here."""
    return Unusable(
        f"{where} has `{name}`{found}, which is not supported; take it out, or leave it aside with "
        f"--ignore-fields {name}."
    )


def asked(text: str) -> list[Message]:
    """Make a conversation of one question."""
    return [{"role": "user", "content": text}]


def from_text(value: Json, opening: str) -> Json:
    """Read JSON that a table keeps as text; any other value is itself.

    Args:
        value: of a column that cannot be text.
        opening: how the JSON begins, [ or {.
    """
    if opening == "{" and isinstance(value, str) and value.strip() in ("", "null"):
        return None  # an empty cell of a CSV file, or JSON text of a null
    if isinstance(value, str) and value.lstrip().startswith(opening):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def read_messages(messages: Json, column: str, fields: Fields) -> list[Message]:
    """Read a list of messages. A last answer that is null is what is asked for, so it is left out.

    Raises:
        Unusable: it is something else, or asks for more than can be done.
    """
    text, messages = messages, from_text(messages, "[")
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else kind_of(messages)
        raise Unusable(f"`{column}` is {found}, expected a list of messages.")
    if isinstance(text, str) and any(twice := keys_twice(text.encode(), messages)):
        raise Unusable(f"`{column}`: {said_twice(twice)}")
    if len(messages) > 1 and _is_open(messages[-1], fields):
        messages = messages[:-1]
    return [_message(message, f"`{column}[{i}]`", fields) for i, message in enumerate(messages)]


def read_turns(turns: Json, column: str) -> list[str]:
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


def refuse_tools(record: Mapping[str, Json], fields: Fields) -> None:
    """Refuse definitions of tools beside what is asked; other columns of these names are columns.

    Raises:
        Unusable: naming the options that decide otherwise.
    """
    tools = {name: record[name] for name in _TOOL_FIELDS if _defines_tools(record.get(name))}
    for name in fields.given(tools):
        raise Unusable(
            f"`{name}` defines tools, which are not supported; write them into a --template, or "
            f"leave them aside with --ignore-fields {name}."
        )


def words_of(message: Mapping[str, Json]) -> tuple[str, str]:
    """Name the fields in which a message has its role and its content."""
    is_sharegpt = message.get("from") is not None and message.get("role") is None
    return ("from", "value") if is_sharegpt else ("role", "content")


def is_assistant(message: Json) -> bool:
    """Whether a message, in whatever words, is the assistant's."""
    if not isinstance(message, dict):
        return False
    word = message.get(words_of(message)[0])
    return isinstance(word, str) and _ROLE_BY_WORD.get(word.lower()) == "assistant"


def _defines_tools(value: Json) -> bool:
    value = from_text(from_text(value, "["), "{")
    if isinstance(value, dict):  # one tool, or tools by their names
        return any(each is not None for each in value.values())
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)


def _is_open(message: Json, fields: Fields) -> bool:
    """Whether a message is an answer that is not there yet."""
    if not isinstance(message, dict) or not is_assistant(message):
        return False
    if message.get(words_of(message)[1]) is not None:
        return False
    return not any(map(fields.given(message).get, _MORE))


def _message(message: Json, where: str, fields: Fields) -> Message:
    """Read one message; keys that nobody knows belong to other programs, but not in a body."""
    if not isinstance(message, dict):
        raise Unusable(f"{where} is {kind_of(message)}, expected an object with role and content.")
    given, (role, content) = fields.given(message), words_of(message)
    read = {"role": _role(given.get(role), role, where)}
    for name in _MORE:
        if from_text(given.get(name), "["):
            raise unsupported(where, name)
    read["content"] = _text(given.get(content), content, where)
    known = (role, content, "name", *_MORE, *_REASONING, *CONTINUED, *_HARMLESS)
    unknown = [name for name, value in given.items() if name not in known and value]
    if where.startswith("`body.") and unknown:
        raise unsupported(where, unknown[0])
    return read | _more(given, where)


def _more(given: Mapping[str, Json], where: str) -> Message:
    """Read what a message says besides role and content."""
    reasoning = next((given[name] for name in _REASONING if given.get(name)), None)
    more: Message = {}
    for name, value in (("name", given.get("name") or None), ("reasoning_content", reasoning)):
        if isinstance(value, str):
            more[name] = value
        elif value is not None:
            raise unsupported(where, name, f" that is {kind_of(value)}")
    if any(given.get(name) is True for name in CONTINUED):
        more["prefix"] = "true"
    return more


def _role(word: Json, field: str, where: str) -> str:
    known = _ROLE_BY_WORD.get(word.lower()) if isinstance(word, str) else None
    if known is not None:
        return known
    if word in _OF_TOOLS:
        raise Unusable(f"{where} has the role {word!r}, and tools are not supported; take it out.")
    found = f"has the role {word!r}" if field == "role" else f"is from {word!r}"
    if word is None:
        found = "has no role"
    expected = ROLES if field == "role" else _ROLE_BY_WORD
    raise Unusable(f"{where} {found}, expected one of {', '.join(expected)}.")


def _text(content: Json, field: str, where: str) -> str:
    """Read a content; parts of text are its lines, as vLLM has it."""
    if isinstance(content, list):
        return "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise Unusable(f"{where} has a {field} that is {kind_of(content)}, expected a string.")
    return content


def _part(part: Json, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        more = [name for name in _MORE if part.get(name)]
        text = part.get("text")
        if isinstance(text, str) and not more:
            return text
    found = part.get("type") if isinstance(part, dict) else kind_of(part)
    raise Unusable(f"{where} has a part that is {found}; only text is supported.")


def listed(columns: Mapping[str, Json]) -> str:
    """List column names for a message."""
    return ", ".join(f"`{name}`" for name in columns) or "none"
