"""Turn an item into a request: pure, one item at a time, nothing read and nothing kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import NamedTuple, TypeAlias

from jinja2 import TemplateError

from dspark_batch.job import openai
from dspark_batch.job.choices import COLUMN, choices_of
from dspark_batch.job.messages import (
    Conversation,
    Message,
    Unusable,
    asked,
    checked_messages,
    checked_turns,
    kind_of,
    listed,
)
from dspark_batch.job.overflow import cut
from dspark_batch.job.spec import Spec
from dspark_batch.job.template import prompt_of
from dspark_batch.types import Failure, Item, Json, Request

Render: TypeAlias = Callable[[Conversation], Sequence[int]]  # conversation -> prompt token ids

CONVERSATIONS, TURNS = "conversations", "turns"  # known by name where no other prompt is


def to_request(
    item: Item, spec: Spec, render: Render, context_length: int, earlier: Sequence[str] = ()
) -> Request | Failure:
    """Render and tokenise one item, or say why it cannot be asked.

    `max_tokens` is cut to the room that the prompt leaves in the context. With the answers to
    earlier turns, the next turn is asked.
    """
    try:
        question = _question(item.record, spec, earlier)
        sampling, max_tokens = choices_of(question.choices, spec, question.column)
        if earlier:
            sampling = replace(sampling, seed=_seed_of_turn(sampling.seed, len(earlier)))
        prompt_ids = _rendered(question.conversation, render)
        if len(prompt_ids) >= context_length and spec.on_overflow.startswith("truncate"):
            shorter = cut(
                question.conversation,
                lambda conversation: _rendered(conversation, render),
                room=context_length - max_tokens,
                keep_end=spec.on_overflow == "truncate-left",
            )
            prompt_ids = prompt_ids if shorter is None else shorter
    except Unusable as error:
        return Failure(item, "bad_record", f"{item.where}: {error}")
    room = context_length - len(prompt_ids)
    if room < 1:
        return _overflow(item, len(prompt_ids), context_length, spec)
    return Request(item, tuple(prompt_ids), min(max_tokens, room), sampling)


def num_turns(record: Mapping[str, Json], spec: Spec) -> int:
    """Count the questions that a record asks one after the other, in a conversation."""
    return len(record[TURNS]) if _has_turns(record, spec) else 1


def last_question(record: Mapping[str, Json], spec: Spec) -> str:
    """Say, for people, what the answer to a record answers; "" if it asks nothing."""
    try:
        earlier = [""] * (num_turns(record, spec) - 1)
        conversation = _question(record, spec, earlier).conversation
    except Unusable:
        return ""
    return conversation if isinstance(conversation, str) else conversation[-1]["content"]


def is_continued(record: Mapping[str, Json], spec: Spec) -> bool:
    """Whether a record is a text to be continued as it stands, without the chat template."""
    return _is_body(record, spec) and record.get("url") == openai.COMPLETIONS


def has_prompt(record: Mapping[str, Json], spec: Spec) -> bool:
    """Whether a record has a column that could be a prompt."""
    names = {spec.prompt_column, spec.messages_column}
    return not names.isdisjoint(record) or _other_shape(record) is not None


class _Question(NamedTuple):
    """What a record asks, and what it chooses for its answer, in the words of `column`."""

    conversation: Conversation
    choices: Json  # None: nothing
    column: str = COLUMN


def _question(record: Mapping[str, Json], spec: Spec, earlier: Sequence[str]) -> _Question:
    own = record.get(COLUMN)
    if spec.template is not None:
        return _Question(_introduced(asked(prompt_of(spec.template, record)), spec), own)
    if _is_body(record, spec):
        batched = openai.request_in(record)
        return _Question(_introduced(batched.conversation, spec), batched.choices, "body")
    return _Question(_introduced(_conversation(record, spec, earlier), spec), own)


def _is_plain(record: Mapping[str, Json], spec: Spec) -> bool:
    """Whether neither of the columns that options name has anything."""
    return record.get(spec.prompt_column) is None and record.get(spec.messages_column) is None


def _is_body(record: Mapping[str, Json], spec: Spec) -> bool:
    return spec.template is None and _is_plain(record, spec) and _other_shape(record) == "body"


def _has_turns(record: Mapping[str, Json], spec: Spec) -> bool:
    return spec.template is None and _is_plain(record, spec) and _other_shape(record) == TURNS


def _conversation(record: Mapping[str, Json], spec: Spec, earlier: Sequence[str]) -> Conversation:
    """Find the conversation in the column that has one; null means absent."""
    prompt, messages = record.get(spec.prompt_column), record.get(spec.messages_column)
    if prompt is not None and messages is not None:
        raise Unusable(
            f"both `{spec.prompt_column}` and `{spec.messages_column}` are given; keep one of them."
        )
    if messages is not None:
        return checked_messages(messages, spec.messages_column)
    if prompt is not None:
        return _prompt(prompt, spec.prompt_column)
    shape = _other_shape(record)
    if shape == CONVERSATIONS:
        return checked_messages(record[CONVERSATIONS], CONVERSATIONS)
    if shape == TURNS:
        return _turns_so_far(checked_turns(record[TURNS], TURNS), earlier)
    if spec.prompt_column in record:
        raise Unusable(f"`{spec.prompt_column}` is null, expected a string.")
    raise Unusable(
        f"no `{spec.prompt_column}` or `{spec.messages_column}`; columns are {listed(record)}; "
        "name the right one with --prompt-column or --messages-column."
    )


def _turns_so_far(turns: Sequence[str], earlier: Sequence[str]) -> list[Message]:
    """Ask the turn that follows the answers."""
    messages = asked(turns[0])
    for answer, question in zip(earlier, turns[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, *asked(question)]
    return messages


def _seed_of_turn(seed: int, turn: int) -> int:
    """Draw each further turn's answer with noise of its own."""
    return int.from_bytes(sha256(f"{seed}/{turn}".encode()).digest()[:8], "big")


def _prompt(prompt: Json, column: str) -> Conversation:
    if not isinstance(prompt, str):
        raise Unusable(f"`{column}` is {kind_of(prompt)}, expected a string.")
    if not prompt:
        raise Unusable(f"`{column}` is empty; there is nothing to answer.")
    return asked(prompt)


def _other_shape(record: Mapping[str, Json]) -> str | None:
    """Recognise a record without prompt and messages by the name and type of a column."""
    if openai.is_request(record):
        return "body"
    lists = (name for name in (CONVERSATIONS, TURNS) if isinstance(record.get(name), list))
    return next(lists, None)


def _introduced(conversation: Conversation, spec: Spec) -> Conversation:
    """Put the shared system prompt first, unless the item brings one of its own."""
    if spec.system_prompt is None:
        return conversation
    if isinstance(conversation, str):
        raise Unusable("a text to be continued has no place for --system-prompt.")
    if any(message["role"] == "system" for message in conversation):
        return conversation
    return [{"role": "system", "content": spec.system_prompt}, *conversation]


def _rendered(conversation: Conversation, render: Render) -> Sequence[int]:
    try:
        prompt_ids = render(conversation)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        raise Unusable(f"the chat template refuses this conversation ({error}).") from error
    if not len(prompt_ids):
        raise Unusable("the prompt renders to no tokens.")
    return prompt_ids


def _overflow(item: Item, prompt_tokens: int, context_length: int, spec: Spec) -> Failure:
    too_many = prompt_tokens - context_length + 1
    uncut = " (no cut of its last question makes room for max_tokens)"
    tried = uncut if spec.on_overflow.startswith("truncate") else ""
    return Failure(
        item,
        "prompt_too_long",
        f"{item.where}: {prompt_tokens} prompt tokens leave no room in a context of "
        f"{context_length}{tried}; shorten the prompt by {too_many} tokens or more.",
        is_skipped=spec.on_overflow == "skip",
    )
