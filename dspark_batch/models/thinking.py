"""Whether a target thinks before it answers, and which part of an answer is the thinking."""

from collections.abc import Mapping, Sequence
from typing import Literal

from jinja2 import TemplateError

from dspark_batch.errors import UsageError
from dspark_batch.models.pairs import DEFAULT_FAMILY, known_pair, pair_of
from dspark_batch.models.tokenizer import Tokenizer
from dspark_batch.types import Said

Choice = Literal["on", "off"]

_PROBE = [{"role": "user", "content": "?"}]


class Thinking:
    """A tokenizer's chat template with the switch for thinking set.

    Attributes:
        choice: what was chosen; None: the template's own default.
    """

    def __init__(self, tokenizer: Tokenizer, asked: Choice | None, default: Choice | None) -> None:
        """Set the switch.

        Args:
            tokenizer: of the target.
            asked: by the user; None: nothing.
            default: what goes then; None: what the template does by itself.

        Raises:
            UsageError: the template cannot do what was asked.
        """
        self._tokenizer = tokenizer
        self.choice = asked or default
        if asked is not None:
            _refuse_impossible(tokenizer, asked)
        self._begins_in_it = _begins_in_it(tokenizer, _switch(self.choice))

    def render(
        self,
        conversation: Sequence[Mapping[str, str]] | str,
        *,
        thinking: bool | None = None,
        as_tokens: bool = False,
        is_answer: bool = False,
    ) -> list[int]:
        """Turn a conversation into prompt ids, as `Tokenizer.render` does.

        Args:
            conversation: or a text.
            thinking: what its record says; None: nothing, so that the switch stays as it is.
            as_tokens: as `Tokenizer.render` has it.
            is_answer: whether the text is an answer, and no prompt; see `Tokenizer.read_answer`.

        Raises:
            ValueError: the template cannot do what the record says.
        """
        if is_answer and isinstance(conversation, str):
            return self._tokenizer.read_answer(conversation, as_tokens=as_tokens)
        if thinking is None:
            thinking = _switch(self.choice)
        else:
            try:
                _refuse_impossible(self._tokenizer, "on" if thinking else "off")
            except UsageError as error:
                raise ValueError(f"enable_thinking is {thinking}, which it has not") from error
        return self._tokenizer.render(conversation, thinking=thinking, as_tokens=as_tokens)

    def split(self, text: str, *, thinking: bool | None = None) -> Said:
        """Tell the thinking at the beginning of an answer from the answer.

        Thinking that never ends is all there is. Newlines beside the marks belong to the marks,
        as the templates of these models read them. `thinking` is what the record said of it.
        """
        tokenizer, spoken = self._tokenizer, text.lstrip()
        begins_in_it = self._begins_in_it
        if thinking is not None:
            begins_in_it = _begins_in_it(tokenizer, thinking)
        if tokenizer.think_start is None or tokenizer.think_end is None:
            return Said(None, text)
        if spoken.startswith(tokenizer.think_start):
            text = spoken.removeprefix(tokenizer.think_start)
        elif not begins_in_it:
            return Said(None, text)
        reasoning, _, answer = text.partition(tokenizer.think_end)
        return Said(reasoning.strip("\n"), answer.lstrip("\n"))


def settle_thinking(
    tokenizer: Tokenizer,
    asked: Choice | None,
    family: str | None,
    target: str | None,
    drafter: str | None,
) -> Thinking:
    """Set the switch for a pair as it was named.

    Raises:
        UsageError: the template cannot do what was asked.
    """
    return Thinking(tokenizer, asked, default_thinking(family, target, drafter))


def default_thinking(
    family: str | None, target: str | None, drafter: str | None = None
) -> Choice | None:
    """Say whether a pair thinks when nobody chose: as its drafter was trained.

    Returns:
        None: a target of the user's own, whose template decides.
    """
    if family is None and target is not None:
        known = pair_of(target, drafter)
    else:
        known = known_pair(family or DEFAULT_FAMILY)
    if known is None:
        return None
    return "on" if known.thinking else "off"


def _refuse_impossible(tokenizer: Tokenizer, asked: Choice) -> None:
    """Refuse a choice that the template does not have."""
    has_switch = _probed(tokenizer, True) != _probed(tokenizer, False)
    always = _begins_in_it(tokenizer, False)
    if tokenizer.think_start is not None and (has_switch or always == (asked == "on")):
        return
    if asked == "on":
        raise UsageError(
            "--thinking on: the target's chat template has no thinking; leave the option out, or "
            "name a --target that thinks."
        )
    if always:
        raise UsageError(
            "--thinking off: the target's chat template always begins with thinking; leave the "
            "option out, or name another --target."
        )


def _begins_in_it(tokenizer: Tokenizer, switch: bool | None) -> bool:
    """Whether the prompt itself opens the thinking, so that an answer begins inside it."""
    if tokenizer.think_start is None:
        return False
    prompt = tokenizer.decode(_probed(tokenizer, switch))
    return prompt.rstrip().endswith(tokenizer.think_start)


def _probed(tokenizer: Tokenizer, switch: bool | None) -> list[int]:
    """Render a question; no tokens, if the template refuses even that."""
    try:
        return tokenizer.render(_PROBE, thinking=switch)
    except TemplateError:
        return []


def _switch(choice: Choice | None) -> bool | None:
    return None if choice is None else choice == "on"
