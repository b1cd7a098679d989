"""Find what a record asks: in which column, in which shape, and by whose choice."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dspark_batch.intake import openai
from dspark_batch.intake.choices import COLUMN
from dspark_batch.intake.json_text import kind_of
from dspark_batch.intake.messages import (
    Conversation,
    Fields,
    Message,
    Unusable,
    asked,
    from_text,
    listed,
    read_messages,
    read_turns,
    refuse_tools,
)
from dspark_batch.intake.template import prompt_of
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Json

BODY, TURNS = "body", "turns"
CONVERSATIONS = ("conversations", "conversation")  # known by name, besides `messages`
_KWARGS = "chat_template_kwargs"


class Question(NamedTuple):
    """What a record asks, and what it chooses for its answer."""

    conversation: Conversation  # that ends with an assistant turn: the answer goes on with it
    choices: Json  # None: nothing
    choices_column: str = COLUMN
    thinking: bool | None = None  # None: as the job says
    ignored: tuple[str, ...] = ()  # names of fields that were left aside

    @property
    def goes_on(self) -> bool:
        """Whether the answer goes on with a text, so that nothing of it is reasoning."""
        if isinstance(self.conversation, str):
            return True
        return self.conversation[-1]["role"] == "assistant"


def question_of(record: Mapping[str, Json], spec: Spec, earlier: Sequence[str] = ()) -> Question:
    """Read what a record asks, behind the answers to earlier turns.

    Raises:
        Unusable: nothing, or what cannot be done here.
    """
    fields = Fields(spec.ignore_fields)
    if spec.template is not None:
        thinking = _thinking(record.get(_KWARGS), _KWARGS)
        prompt = asked(prompt_of(spec.template, record))
        question = Question(prompt, record.get(COLUMN), thinking=thinking)
    elif (column := column_of(record, spec)) == BODY:
        question = _requested(record, spec, fields, earlier)
    else:
        refuse_tools(record, fields)
        conversation = _conversation(record, column, spec, fields, earlier)
        thinking = _thinking(record.get(_KWARGS), _KWARGS)
        question = Question(conversation, record.get(COLUMN), thinking=thinking)
    conversation = _introduced(question.conversation, record, spec)
    return question._replace(conversation=conversation, ignored=tuple(fields.ignored))


def num_turns(record: Mapping[str, Json], spec: Spec) -> int:
    """Count the questions that a record asks one after the other, in a conversation."""
    try:
        column = None if spec.template is not None else column_of(record, spec)
        if column == TURNS:
            return len(read_turns(from_text(record[TURNS], "["), TURNS))
        if column is None or spec.regenerate != "all":
            return 1
        messages = _messages(record, column, Fields(spec.ignore_fields))
        return max(1, len(list(places_of_answers(messages))))
    except Unusable:
        return 1


def has_question(record: Mapping[str, Json], spec: Spec) -> bool:
    """Whether a record has a column that could be a prompt."""
    names = {spec.prompt_name, spec.messages_name}
    return not names.isdisjoint(record) or next(_others(record), None) is not None


def places_of_answers(messages: Sequence[Message]) -> Iterator[int]:
    """Yield where the answers to the user stand, and behind the last question where one belongs."""
    has_question = False
    for place, message in enumerate(messages):
        is_answer = message["role"] == "assistant"
        if is_answer and place and messages[place - 1]["role"] == "assistant":
            raise Unusable(f"message {place} and the one before it are both the assistant's.")
        if is_answer and has_question:
            yield place
        has_question |= message["role"] == "user"
    if has_question and messages[-1]["role"] != "assistant":
        yield len(messages)


def without_last_answer(messages: Sequence[Message]) -> list[Message]:
    """Leave out the assistant's turns at the end."""
    length = len(messages)
    while length and messages[length - 1]["role"] == "assistant":
        length -= 1
    return list(messages[:length])


def column_of(record: Mapping[str, Json], spec: Spec) -> str:
    """Choose the column that is asked: the one that an option names, else the only one there is.

    Raises:
        Unusable: there is none, or several.
    """
    given = (spec.prompt_column, spec.messages_column)
    named = [name for name in dict.fromkeys(given) if name is not None]
    found = named or ["prompt", "messages", *_others(record, is_certain=True)]
    there = [name for name in found if record.get(name) is not None]
    if not named and not there:
        there = [*_others(record)]
    if not named and len(there) > 1:  # in a CSV file what is not there is empty text
        there = [name for name in there if record[name] != ""] or there
    if len(there) == 1:
        return there[0]
    if there:
        ways = (f"--{'prompt' if n == 'prompt' else 'messages'}-column {n}" for n in there)
        both = " and ".join(f"`{name}`" for name in there)
        raise Unusable(f"both {both} are given; choose with {' or '.join(ways)}.")
    empty = [name for name in named or ("prompt", "messages") if name in record]
    if empty:
        raise Unusable(f"`{empty[0]}` is null, expected {_expected(empty[0], spec)}.")
    raise Unusable(
        f"no {' or '.join(f'`{name}`' for name in named or ('prompt', 'messages'))}; columns are "
        f"{listed(record)}; name the right one with --prompt-column or --messages-column."
    )


def _expected(column: str, spec: Spec) -> str:
    return "a string" if column == spec.prompt_name else "a list of messages"


def _others(record: Mapping[str, Json], *, is_certain: bool = False) -> Iterator[str]:
    """Find the columns whose name and type are those of a known shape.

    Args:
        record: of which.
        is_certain: only a column that is one in its first values, too.
    """
    body = openai.body_of(record)
    if body is not None and (not is_certain or body.keys() & {"messages", "prompt"}):
        yield BODY
    for name in (*CONVERSATIONS, TURNS):
        value = from_text(record.get(name), "[")
        if isinstance(value, list) and (not is_certain or _begins_as(name, value)):
            yield name


def _begins_as(name: str, value: Sequence[Json]) -> bool:
    first = value[0] if value else None
    if name == TURNS:
        return isinstance(first, str)
    return isinstance(first, dict) and not first.keys().isdisjoint(("role", "from"))


def _requested(
    record: Mapping[str, Json], spec: Spec, fields: Fields, earlier: Sequence[str]
) -> Question:
    batched = openai.request_in(record, fields)
    conversation = batched.conversation
    if isinstance(conversation, str):
        _refuse_to_regenerate("body.prompt", spec)
    elif spec.regenerate == "all":
        conversation = _again(conversation, "body.messages", earlier)
    else:
        if batched.goes_on and conversation[-1]["role"] != "assistant":
            raise Unusable("`body.continue_final_message` has no assistant message to go on with.")
        conversation = _ended(conversation, "body.messages", spec, goes_on=batched.goes_on)
    thinking = _thinking(batched.template_kwargs, f"body.{_KWARGS}")
    return Question(conversation, batched.choices, "body", thinking)


def _conversation(
    record: Mapping[str, Json], column: str, spec: Spec, fields: Fields, earlier: Sequence[str]
) -> Conversation:
    if column == TURNS:
        turns = read_turns(from_text(record[TURNS], "["), TURNS)
        _refuse_to_regenerate(TURNS, spec)
        return _behind(earlier, map(asked, turns))
    if _is_text(record[column], column, spec):
        _refuse_to_regenerate(column, spec)
        return _prompt(record[column], column)
    messages = _messages(record, column, fields)
    if spec.regenerate == "all":
        return _again(messages, column, earlier)
    return _ended(messages, column, spec, goes_on=False)


def _refuse_to_regenerate(column: str, spec: Spec) -> None:
    if spec.regenerate is not None:
        raise Unusable(f"`{column}` has no answers; --regenerate needs a list of messages.")


def _again(messages: list[Message], column: str, earlier: Sequence[str]) -> list[Message]:
    """Ask for the next answer of a conversation, behind new answers instead of the old ones."""
    places = list(places_of_answers(messages))
    starts = [0, *(place + 1 for place in places)]
    parts = [messages[a:b] for a, b in zip(starts, places, strict=False)]
    asked_now = _behind(earlier, parts) or messages
    return _checked([{n: v for n, v in m.items() if n != "prefix"} for m in asked_now], column)


def _is_text(value: Json, column: str, spec: Spec) -> bool:
    """Whether a column is read as one text: not a list of messages, as TRL has it."""
    if column != spec.prompt_name or column == spec.messages_column != spec.prompt_column:
        return False
    return not (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _messages(record: Mapping[str, Json], column: str, fields: Fields) -> list[Message]:
    if column != BODY:
        return read_messages(record[column], column, fields)
    conversation = openai.request_in(record, fields).conversation
    return [] if isinstance(conversation, str) else conversation


def _behind(earlier: Sequence[str], parts: Iterable[list[Message]]) -> list[Message]:
    """Put the parts of a conversation together, as far as their answers are there."""
    messages: list[Message] = []
    for answer, part in zip((*earlier, None), parts, strict=False):
        messages += part
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def _prompt(prompt: Json, column: str) -> Conversation:
    if not isinstance(prompt, str):
        raise Unusable(f"`{column}` is {kind_of(prompt)}, expected a string.")
    if not prompt:
        raise Unusable(f"`{column}` is empty; there is nothing to answer.")
    return asked(prompt)


def _ended(messages: list[Message], column: str, spec: Spec, *, goes_on: bool) -> list[Message]:
    """Decide what becomes of an assistant turn at the end: the record, else the job says it."""
    is_marked = any("prefix" in message for message in messages)
    if is_marked and any("prefix" in message for message in messages[:-1]):
        raise Unusable(f"`{column}` has `prefix` before its last message; take it out.")
    messages = [{n: v for n, v in message.items() if n != "prefix"} for message in messages]
    if messages[-1]["role"] == "assistant":
        choice = "drop" if spec.regenerate else spec.last_assistant
        if goes_on or (is_marked and not spec.regenerate):
            choice = "continue"
        if choice == "refuse":
            raise Unusable(
                f"`{column}` ends with an assistant turn; choose with --last-assistant: drop "
                "answers the turn before it, continue goes on with it."
            )
        if choice == "drop":
            messages = without_last_answer(messages)
        elif not messages[-1]["content"].strip():
            raise Unusable(f"the last message of `{column}` is blank; there is nothing to go on.")
    return _checked(messages, column)


def _checked(messages: list[Message], column: str) -> list[Message]:
    """Refuse a conversation that asks nothing."""
    if not any(message["role"] == "user" for message in messages):
        raise Unusable(f"`{column}` has no user message; there is nothing to answer.")
    if messages[-1]["role"] == "user" and not messages[-1]["content"]:
        raise Unusable(f"the last message of `{column}` is empty; there is nothing to answer.")
    return messages


def _thinking(kwargs: Json, column: str) -> bool | None:
    """Read whether a record lets the model think; None: it does not say."""
    given = from_text(kwargs, "{")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise Unusable(f"`{column}` is {kind_of(given)}, expected an object.")
    for name, value in given.items():
        if value is not None and (name != "enable_thinking" or not isinstance(value, bool)):
            raise Unusable(f"`{column}.{name}` is {value!r}, which is not supported; take it out.")
    return given.get("enable_thinking")


def _introduced(conversation: Conversation, record: Mapping[str, Json], spec: Spec) -> Conversation:
    """Put a system prompt first: the conversation's own, else the record's, else the job's."""
    own = None if spec.system_column is None else record.get(spec.system_column)
    if own is not None and not isinstance(own, str):
        raise Unusable(f"`{spec.system_column}` is {kind_of(own)}, expected a string.")
    prompt = own or spec.system_prompt
    if prompt is None:
        return conversation
    if isinstance(conversation, str):
        way = "--system-column" if own else "--system-prompt"
        raise Unusable(f"a text to be continued has no place for {way}.")
    system = [m["content"] for m in conversation if m["role"] == "system"]
    if own and system and own not in system:
        raise Unusable(
            f"`{spec.system_column}` and the conversation have different system prompts; drop one."
        )
    return conversation if system else [{"role": "system", "content": prompt}, *conversation]
