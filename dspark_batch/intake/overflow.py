"""Cut a conversation that is too long, in its last question only."""

from collections.abc import Callable, Sequence

from dspark_batch.intake.messages import Conversation, Unusable


def cut(
    conversation: Conversation,
    render: Callable[[Conversation], Sequence[int]],
    *,
    room: int,
    keep_end: bool,
) -> Sequence[int] | None:
    """Render as much of the last user text as fits; None: not even one character does.

    Args:
        conversation: too long as it is.
        render: to prompt token ids; longer text must not give fewer tokens by much.
        room: most prompt tokens.
        keep_end: cut at the beginning of the text, else at its end.
    """
    length = len(_text_of(conversation))
    best, most = None, length - 1  # characters that stay
    least = 1
    while least <= most:
        middle = (least + most + 1) // 2
        prompt_ids = render(_with_part(conversation, middle, keep_end=keep_end))
        if len(prompt_ids) <= room:
            best, least = prompt_ids, middle + 1
        else:
            most = middle - 1
    return best


def _text_of(conversation: Conversation) -> str:
    if isinstance(conversation, str):
        return conversation
    return _last_question(conversation)["content"]


def _last_question(messages: Sequence[dict[str, str]]) -> dict[str, str]:
    for message in reversed(messages):
        if message["role"] == "user":
            return message
    raise Unusable("the conversation is too long, and it has no user message to cut.")


def _with_part(conversation: Conversation, length: int, *, keep_end: bool) -> Conversation:
    text = _text_of(conversation)
    part = text[len(text) - length :] if keep_end else text[:length]
    if isinstance(conversation, str):
        return part
    last = _last_question(conversation)
    return [message | {"content": part} if message is last else message for message in conversation]
