"""Text to token ids and back, as the target's own tokenizer does it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from dspark_batch.errors import ModelError
from dspark_batch.models.grammar import Grammars, Marks

_NO_LIMIT = 1 << 60
_PRIVATE = range(0xE000, 0xF900)  # characters that Unicode keeps for such use
_LOOKS_LIKE_CONTROL = re.compile(r"<\|.+\|>")

Messages = Sequence[Mapping[str, str]]


class Tokenizer:
    """The target's tokenizer and chat template.

    Attributes:
        stop_ids: tokens that end an answer.
        chat_template: the template's source; None if the checkpoint has none.
        think_start, think_end: the texts around thinking; None if the model has no such tokens.
    """

    def __init__(self, wrapped: TokenizerWrapper) -> None:
        self._wrapped = wrapped
        self.stop_ids: frozenset[int] = frozenset(wrapped.eos_token_ids)
        self.chat_template: str | None = (
            wrapped.chat_template if wrapped.has_chat_template else None
        )
        self.think_start: str | None = wrapped.think_start
        self.think_end: str | None = wrapped.think_end
        tool_calls = (getattr(wrapped, f"tool_call_{end}", None) for end in ("start", "end"))
        self._marks = {self.think_start, self.think_end, *tool_calls} - {None}
        self._control = _control_tokens(wrapped, self._marks)

    def render(
        self, messages: Messages | str, *, thinking: bool | None = False, as_tokens: bool = False
    ) -> list[int]:
        """Turn a conversation into prompt ids, up to where the answer begins.

        Args:
            messages: a conversation; one that ends with an assistant turn is gone on with. A text
                is none: it is to be continued as it stands.
            thinking: what the chat template is told; None: nothing, so that it decides.
            as_tokens: whether the names of control tokens in a message are these tokens; else they
                are text. In a text that is continued they are.

        Raises:
            ValueError: the checkpoint has no chat template and this is more than one message, or
                the template loses the turn to go on with.
            jinja2.TemplateError: the template refuses the conversation.
        """
        if isinstance(messages, str):
            return self._wrapped.encode(messages)
        cut, end = _unused_characters(messages)
        if not as_tokens:
            messages = [self._as_text(message, cut) for message in messages]
        is_plain = not any(cut in text for message in messages for text in message.values())
        if self.chat_template is not None:
            if messages[-1]["role"] == "assistant":
                return self._encoded(self._up_to_the_end(messages, thinking, end), cut)
            if is_plain:
                how = {"tokenize": True, "add_generation_prompt": True}
                ids: list[int] = self._templated(messages, thinking, **how)
                return ids
            return self._encoded(self._text_of(messages, thinking), cut)
        if len(messages) != 1:
            raise ValueError(
                f"the target has no chat template, so it takes one prompt, not {len(messages)} "
                "messages or a system prompt"
            )
        content = messages[0]["content"]
        return self._wrapped.encode(content) if is_plain else self._encoded(content, cut)

    def read_answer(self, text: str, *, as_tokens: bool = False) -> list[int]:
        """Turn the text of an answer into the ids that it has behind a prompt.

        Args:
            text: without the token that ends an answer.
            as_tokens: as `render` has it.

        Raises:
            ValueError: the tokenizer cannot read it as text.
        """
        said = {"role": "assistant", "content": text}
        cut, _ = _unused_characters([said])
        return self._encoded(text if as_tokens else self._as_text(said, cut)["content"], cut)

    def _templated(
        self,
        messages: Messages,
        thinking: bool | None,
        **how: bool,
    ) -> Any:  # noqa: ANN401  ids or text, as it is told
        if thinking is not None:
            return self._wrapped.apply_chat_template(
                list(messages), **how, enable_thinking=thinking
            )
        # mlx-lm's wrapper would decide for the template, so it is asked without the wrapper.
        return self._wrapped._tokenizer.apply_chat_template(
            list(messages), **how, return_dict=False
        )

    def _text_of(
        self, messages: Messages, thinking: bool | None, *, add_generation_prompt: bool = True
    ) -> str:
        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        text: str = self._templated(messages, thinking, **how)
        return text

    def _up_to_the_end(self, messages: Messages, thinking: bool | None, end: str) -> str:
        """Render a conversation up to where the text of its last message ends."""
        last = {**messages[-1], "content": messages[-1]["content"] + end}
        whole = self._text_of([*messages[:-1], last], thinking, add_generation_prompt=False)
        text, mark, _ = whole.rpartition(end)
        if not mark:
            raise ValueError("it leaves out the assistant turn to go on with")
        return text

    def _as_text(self, message: Mapping[str, str], cut: str) -> dict[str, str]:
        """Cut the names of control tokens apart; an assistant's own marks stay."""
        kept = self._marks if message["role"] == "assistant" else ()

        def apart(found: re.Match[str]) -> str:
            name = found[0]
            return name if name in kept else f"{name[0]}{cut}{name[1:]}"

        return {
            field: self._control.sub(apart, text) if field != "role" else text
            for field, text in message.items()
        }

    def _encoded(self, text: str, cut: str) -> list[int]:
        """Turn text into ids, piece by piece, so that no token spans a cut."""
        pieces, whole = text.split(cut), text.replace(cut, "")
        ids = [i for piece in pieces for i in self._wrapped.encode(piece, add_special_tokens=False)]
        expected = self._wrapped.encode(whole, add_special_tokens=False)
        if self.decode(ids) != self.decode(expected):
            raise ValueError(
                "the tokenizer cannot read the names of control tokens in it as text; with "
                "--special-tokens as-tokens they are the tokens"
            )
        return ids

    def spellings(self, words: Iterable[str]) -> list[list[int]]:
        """Turn words into the tokens that spell them, at the beginning of a text and within it.

        Source:
            vLLM: without a space in front; with one too, if as many tokens spell it, the first
            another.
        """
        found: list[list[int]] = []
        for word in words:
            bare, spaced = (
                self._wrapped.encode(space + word.lstrip(), add_special_tokens=False)
                for space in ("", " ")
            )
            found.append(bare)
            if spaced[:1] != bare[:1] and len(spaced) == len(bare):
                found.append(spaced)
        return [ids for ids in found if ids]

    @cached_property
    def grammars(self) -> Grammars:
        """The compiled grammars over these tokens.

        Raises:
            ValueError: see `Grammars`.
        """
        start, end = self._wrapped.think_start_tokens, self._wrapped.think_end_tokens
        marks = Marks(tuple(start), tuple(end)) if start and end else Marks()
        return Grammars(self._wrapped._tokenizer, self.stop_ids, marks)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text; special tokens stay visible, spaces stay as they are."""
        return self._wrapped.decode(list(token_ids), clean_up_tokenization_spaces=False)


def _control_tokens(wrapped: TokenizerWrapper, marks: set[str]) -> re.Pattern[str]:
    """Find the names of tokens that steer a model, and are no text of a person."""
    added = wrapped._tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special}
    names |= {token.content for token in added if _LOOKS_LIKE_CONTROL.fullmatch(token.content)}
    known = sorted((name for name in names | marks if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or "(?!)")


def _unused_characters(messages: Messages) -> Iterable[str]:
    """Find two characters that no message has."""
    texts = [text for message in messages for text in message.values()]
    return islice((c for c in map(chr, _PRIVATE) if not any(c in text for text in texts)), 2)


def read_tokenizer(
    path: Path, eos_token_ids: int | list[int] | None, *, trust_remote_code: bool = False
) -> Tokenizer:
    """Read the tokenizer of a checkpoint directory; code of its own runs only if it is trusted.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        # Without a limit of its own it says nothing about long prompts; they are measured later.
        settings = {"trust_remote_code": trust_remote_code, "model_max_length": _NO_LIMIT}
        return Tokenizer(load_tokenizer(path, settings, eos_token_ids=eos_token_ids))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: no usable tokenizer ({error}). "
            "Download the target again, or name another --target."
        ) from error
