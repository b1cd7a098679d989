"""Turn an item into a request: pure, one item at a time, nothing read and nothing kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import NamedTuple, TypeAlias

from jinja2 import TemplateError

from dspark_batch.intake.choices import choices_of
from dspark_batch.intake.json_text import is_text, kind_of, sayable
from dspark_batch.intake.messages import Conversation, Fields, Unusable
from dspark_batch.intake.overflow import cut
from dspark_batch.intake.question import Question, num_turns, question_of
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Failure, Given, Item, Json, Request, Said, Sampling

# Conversation -> prompt token ids. Keywords: `thinking` where a record chooses it, and `as_tokens`
# where data may hold control tokens.
Render: TypeAlias = Callable[..., Sequence[int]]
Split: TypeAlias = Callable[..., Said]  # text -> its two parts; keyword: `thinking`, as above


def to_request(
    item: Item, spec: Spec, render: Render, context_length: int, earlier: Sequence[str] = ()
) -> Request | Failure:
    """Render and tokenise one item, or say why it cannot be asked.

    `max_tokens` is cut to the room that the prompt leaves in the context. With the answers to
    earlier turns, the next turn is asked.
    """
    try:
        question, sampling, max_tokens = _asked(item.record, spec, earlier)
        if sampling.structure is not None and question.goes_on:
            at_once = sampling.structure._replace(after_thinking=False)
            sampling = replace(sampling, structure=at_once)
        if earlier:
            sampling = replace(sampling, seed=_seed_of_turn(sampling.seed, len(earlier)))
        ask = partial(_rendered, render=_told(render, question, spec))
        prompt_ids = ask(question.conversation)
        given = _given(item.record, spec, render)
        if len(prompt_ids) >= context_length and spec.on_overflow.startswith("truncate"):
            shorter = cut(
                question.conversation,
                ask,
                room=context_length - max_tokens,
                keep_end=spec.on_overflow == "truncate-left",
            )
            prompt_ids = prompt_ids if shorter is None else shorter
    except Unusable as error:
        return Failure(item, "bad_record", f"{item.where}: {sayable(str(error))}")
    ignored = (f"ignored `{name}`" for name in question.ignored)
    item = item._replace(notes=(*item.notes, *ignored))
    room = context_length - len(prompt_ids)
    if given is not None:
        return _scored(Request(item, tuple(prompt_ids), 1, sampling), given, room, spec)
    if room < 1:
        return _overflow(item, len(prompt_ids), context_length, spec)
    return Request(item, tuple(prompt_ids), min(max_tokens, room), sampling)


def _given(record: Mapping[str, Json], spec: Spec, render: Render) -> Given | None:
    """Read the answer that is to be scored; None: one is to be generated."""
    if spec.score is None:
        return None
    text = record.get(spec.score)
    if not isinstance(text, str):
        raise Unusable(f"`{spec.score}` is {kind_of(text)}, expected the text to score.")
    if num_turns(record, spec) > 1:
        raise Unusable(f"it asks several questions, and `{spec.score}` answers one.")
    if not is_text(text):
        raise Unusable(f"`{spec.score}` has half of a surrogate pair, which is no text; repair it.")
    how = {"as_tokens": True} if spec.special_tokens == "as-tokens" else {}
    try:
        return Given(text, tuple(render(text, is_answer=True, **how)))
    except (ValueError, TypeError, LookupError) as error:
        raise Unusable(f"`{spec.score}` has no tokens here ({error}).") from error


def _scored(asked: Request, given: Given, room: int, spec: Spec) -> Request | Failure:
    """Ask for the scores of an answer, which nothing but the target's logits decides.

    Args:
        asked: the prompt.
        given: the answer.
        room: positions that the prompt leaves in the context.
        spec: the job.
    """
    num_tokens, item = len(given.token_ids), asked.item
    if room < max(1, num_tokens):
        prompt_tokens = len(asked.prompt_ids)
        return Failure(
            item,
            "prompt_too_long",
            f"{item.where}: {prompt_tokens} prompt tokens and {num_tokens} of `{spec.score}` do "
            f"not fit into a context of {prompt_tokens + room}; shorten them by "
            f"{max(1, num_tokens) - room} tokens or more.",
            is_skipped=spec.on_overflow == "skip",
        )
    told = asked.sampling
    sampling = Sampling(logprobs=told.logprobs or 0, prompt_logprobs=told.prompt_logprobs)
    return replace(asked, max_tokens=max(1, num_tokens), sampling=sampling, given=given)


def ignored_in(record: Mapping[str, Json], spec: Spec) -> tuple[str, ...]:
    """Name the fields of a record that are left aside; none, if it cannot be asked."""
    try:
        return _asked(record, spec, ()).question.ignored
    except Unusable:
        return ()


class _Asked(NamedTuple):
    question: Question
    sampling: Sampling
    max_tokens: int  # most tokens of the answer


def _asked(record: Mapping[str, Json], spec: Spec, earlier: Sequence[str]) -> _Asked:
    question, fields = question_of(record, spec, earlier), Fields(spec.ignore_fields)
    chosen = choices_of(question.choices, spec, question.choices_column, fields)
    ignored = tuple(dict.fromkeys((*question.ignored, *fields.ignored)))
    return _Asked(question._replace(ignored=ignored), *chosen)


def last_question(record: Mapping[str, Json], spec: Spec) -> str:
    """Say, for people, what the answer to a record answers; "" if it asks nothing."""
    try:
        earlier = [""] * (num_turns(record, spec) - 1)
        conversation = question_of(record, spec, earlier).conversation
    except Unusable:
        return ""
    return conversation if isinstance(conversation, str) else conversation[-1]["content"]


def said_in(text: str, record: Mapping[str, Json], spec: Spec, split: Split) -> Said:
    """Tell the reasoning of an answer from the answer.

    A text that is continued has none, and neither has an answer that was given.
    """
    return splitter(record, spec, split)(text)


def splitter(record: Mapping[str, Json], spec: Spec, split: Split) -> Callable[[str], Said]:
    """Make what tells reasoning and answer to one record apart, as `said_in` does."""
    try:
        question = question_of(record, spec)
    except Unusable:
        return split
    if question.goes_on or spec.score is not None:
        return partial(Said, None)
    return split if question.thinking is None else partial(split, thinking=question.thinking)


def _seed_of_turn(seed: int, turn: int) -> int:
    """Draw each further turn's answer with noise of its own."""
    return int.from_bytes(sha256(f"{seed}/{turn}".encode()).digest()[:8], "big")


def _told(render: Render, question: Question, spec: Spec) -> Render:
    """Tell the renderer what a record or the job decided; without that, it decides itself."""
    told = {} if question.thinking is None else {"thinking": question.thinking}
    if spec.special_tokens == "as-tokens":
        told["as_tokens"] = True
    return partial(render, **told) if told else render


def _rendered(conversation: Conversation, render: Render) -> Sequence[int]:
    messages = [] if isinstance(conversation, str) else conversation
    said = [text for message in messages for text in message.values()]
    said += [conversation] if isinstance(conversation, str) else []
    if not all(map(is_text, said)):
        raise Unusable("the prompt has half of a surrogate pair, which is no text; repair it.")
    try:
        prompt_ids = render(conversation)
        if any("name" in message for message in messages):
            _refuse_lost_names(prompt_ids, messages, render)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        raise Unusable(f"the chat template refuses this conversation ({error}).") from error
    if not len(prompt_ids):
        raise Unusable("the prompt renders to no tokens.")
    return prompt_ids


def _refuse_lost_names(
    prompt_ids: Sequence[int], messages: Sequence[Mapping[str, str]], render: Render
) -> None:
    """Refuse names of speakers that the chat template does not write."""
    nameless = [{k: v for k, v in message.items() if k != "name"} for message in messages]
    if list(prompt_ids) == list(render(nameless)):
        raise Unusable(
            "a message has a `name`, which the chat template has no place for; write it into the "
            "content, or leave it aside with --ignore-fields name."
        )


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
