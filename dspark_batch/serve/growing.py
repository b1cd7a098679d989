"""The text of an answer while it grows, as a client may have it."""

from typing import NamedTuple

from dspark_batch.answers.text_stream import TextStream
from dspark_batch.intake.mapping import splitter
from dspark_batch.opening import Opened
from dspark_batch.output.responses import logprobs_of
from dspark_batch.record.rows import of_answer
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Json, Logprobs, Partial, Request, Said


class Unkept(Exception):
    """The whole answer does not begin with what was sent of it."""


class Delta(NamedTuple):
    """What is new."""

    reasoning: str
    text: str


class Growing:
    """Tells of each answer what is new; all together is the answer, reasoning and text.

    Args:
        request: what was asked.
        spec: of the server.
        opened: knows how tokens are text, and which of it is reasoning.
    """

    def __init__(self, request: Request, spec: Spec, opened: Opened) -> None:
        self._split = splitter(request.item.record, spec, opened.split)
        self._may_think = bool(opened.marks)
        sampling = request.sampling
        self._stream = TextStream(opened.decode, sampling.stop, opened.marks, sampling.min_tokens)
        self._raw = ""
        self._num_tokens = 0
        self._sent = Said("", "")
        self._num_told = 0  # tokens whose log-probabilities were given, and their characters
        self._num_told_characters = 0

    def add(self, partial: Partial) -> Delta:
        """Take what is committed so far."""
        new, self._num_tokens = partial.token_ids[self._num_tokens :], len(partial.token_ids)
        self._raw += self._stream.add(*new)
        if self._may_think and not self._raw.strip():
            return Delta("", "")  # reasoning may come
        return self._new(self._split(self._raw))

    def end(self, completion: Completion) -> Delta:
        """Take the whole answer, reasoning and text told apart.

        Raises:
            Unkept: the tokenizer took back what it said.
        """
        said = Said(completion.reasoning, completion.text)
        delta = self._new(said)
        if self._sent != Said(said.reasoning or "", said.answer):
            raise Unkept
        return delta

    def told(self, logprobs: Logprobs | None, *, is_chat: bool) -> Json:
        """Give the log-probabilities of the tokens that were not told of; None: there are none.

        Args:
            logprobs: of all tokens so far; None: nobody asked.
            is_chat: which of OpenAI's shapes.
        """
        new = of_answer(logprobs and logprobs.behind(self._num_told))
        if logprobs is None or new is None or not new["tokens"]:
            return None
        offset = self._num_told_characters
        self._num_told = len(logprobs.tokens)
        self._num_told_characters += sum(map(len, new["tokens"]))
        return logprobs_of(new, is_chat=is_chat, offset=offset)

    def _new(self, said: Said) -> Delta:
        before, now = self._sent.reasoning or "", said.reasoning or ""
        if not (now.startswith(before) and said.answer.startswith(self._sent.answer)):
            return Delta("", "")
        new = Delta(now[len(before) :], said.answer[len(self._sent.answer) :])
        self._sent = Said(now, said.answer)
        return new
