"""Text to token ids and back, as the target's own tokenizer does it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from dspark_batch.errors import ModelError

_NO_LIMIT = 1 << 60


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

    def render(
        self, messages: Sequence[Mapping[str, str]] | str, *, thinking: bool | None = False
    ) -> list[int]:
        """Turn a conversation into prompt ids, up to where the answer begins.

        Args:
            messages: a conversation; a text is none: it is to be continued as it stands.
            thinking: what the chat template is told; None: nothing, so that it decides.

        Raises:
            ValueError: the checkpoint has no chat template and this is more than one message.
            jinja2.TemplateError: the template refuses the conversation.
        """
        if isinstance(messages, str):
            return self._wrapped.encode(messages)
        if self.chat_template is not None:
            return self._templated(list(messages), thinking)
        if len(messages) != 1:
            raise ValueError(
                f"the target has no chat template, so it takes one prompt, not {len(messages)} "
                "messages or a system prompt"
            )
        return self._wrapped.encode(messages[0]["content"])

    def _templated(self, messages: list[Mapping[str, str]], thinking: bool | None) -> list[int]:
        if thinking is not None:
            return self._wrapped.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=thinking
            )
        # mlx-lm's wrapper would decide for the template, so it is asked without the wrapper.
        return self._wrapped._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text; special tokens stay visible, spaces stay as they are."""
        return self._wrapped.decode(list(token_ids), clean_up_tokenization_spaces=False)


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
