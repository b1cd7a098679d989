"""Turn an item into a request: pure, one item at a time, nothing read and nothing kept."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from jinja2 import TemplateError

from dspark_batch.job.choices import choices_of
from dspark_batch.job.spec import Spec
from dspark_batch.types import Failure, Item, Json, Request

Message: TypeAlias = dict[str, str]  # {"role": ..., "content": ...}
Render: TypeAlias = Callable[[list[Message]], Sequence[int]]  # messages -> prompt token ids

ROLES = ("system", "user", "assistant")


def to_request(item: Item, spec: Spec, render: Render, context_length: int) -> Request | Failure:
    """Render and tokenise one item, or say why it cannot be asked.

    `max_tokens` is cut to the room that the prompt leaves in the context.
    """
    try:
        messages = _with_system_prompt(_messages(item.record, spec), spec.system_prompt)
        prompt_ids = tuple(render(messages))
    except _Unusable as error:
        return Failure(item, "bad_record", f"{item.where}: {error}")
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        return Failure(
            item,
            "bad_record",
            f"{item.where}: the chat template refuses this conversation ({error}).",
        )
    if not prompt_ids:
        return Failure(item, "bad_record", f"{item.where}: the prompt renders to no tokens.")
    try:
        sampling, max_tokens = choices_of(item.record, spec)
    except ValueError as error:
        return Failure(item, "bad_record", f"{item.where}: {error}.")
    room = context_length - len(prompt_ids)
    if room < 1:
        return Failure(
            item,
            "prompt_too_long",
            f"{item.where}: {len(prompt_ids)} prompt tokens leave no room in a context of "
            f"{context_length}; shorten the prompt by {1 - room} tokens or more.",
        )
    return Request(item, prompt_ids, min(max_tokens, room), sampling)


class _Unusable(Exception):
    """What is wrong with a record, without saying where."""


def _messages(record: dict[str, Json], spec: Spec) -> list[Message]:
    """Find the conversation in the prompt column or the messages column; null means absent."""
    prompt, messages = record.get(spec.prompt_column), record.get(spec.messages_column)
    if prompt is not None and messages is not None:
        raise _Unusable(
            f"both `{spec.prompt_column}` and `{spec.messages_column}` are given; keep one of them."
        )
    if messages is not None:
        return _checked_messages(messages, spec.messages_column)
    if prompt is None and spec.prompt_column not in record:
        columns = ", ".join(f"`{name}`" for name in record) or "none"
        raise _Unusable(
            f"no `{spec.prompt_column}` or `{spec.messages_column}`; columns are {columns}; "
            "name the right one with --prompt-column or --messages-column."
        )
    if not isinstance(prompt, str):
        raise _Unusable(f"`{spec.prompt_column}` is {_kind(prompt)}, expected a string.")
    if not prompt:
        raise _Unusable(f"`{spec.prompt_column}` is empty; there is nothing to answer.")
    return [{"role": "user", "content": prompt}]


def _checked_messages(messages: Json, column: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else _kind(messages)
        raise _Unusable(f"`{column}` is {found}, expected a list of messages.")
    return [_message(message, f"`{column}[{i}]`") for i, message in enumerate(messages)]


def _message(message: Json, where: str) -> Message:
    """Keep role and content of a message; other keys are for other programs."""
    if not isinstance(message, dict):
        raise _Unusable(f"{where} is {_kind(message)}, expected an object with role and content.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _Unusable(f"{where} has the role {role!r}, expected one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise _Unusable(f"{where} has a content that is {_kind(content)}, expected a string.")
    return {"role": role, "content": content}


def _with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Put the shared system prompt first, unless the item brings one of its own."""
    if system_prompt is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _kind(value: Json) -> str:
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
