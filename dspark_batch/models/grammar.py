"""Which tokens a grammar lets come next, behind an answer that grows.

llguidance does the work. Its matcher stands behind the tokens that are committed; along drafts it
goes ahead, and is taken back.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dspark_batch.types import Structure

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher
    from transformers import PreTrainedTokenizerFast

Bits: TypeAlias = npt.NDArray[np.uint32]  # [ceil(V / 32)], a bit for each token, the lowest first

_Part: TypeAlias = Literal["opening", "thinking", "answer"]  # of what a target says

_BLANKS = 2  # tokens that a template may write behind a mark
_COMPILED = 256  # grammars that are kept


class Marks(NamedTuple):
    """The tokens around thinking; (): the target does not think."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


class Grammars:
    """The compiled grammars over one tokenizer; each distinct one is compiled once.

    Args:
        tokenizer: the target's.
        stop_ids: the target's, at least one: they may come where an answer may end.
        marks: of its thinking.

    Raises:
        ValueError: llguidance cannot read this tokenizer.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", stop_ids: frozenset[int], marks: Marks
    ) -> None:
        from llguidance import hf

        if not stop_ids:
            raise ValueError("the target has no stop token, so no structured answer could end")
        self._tokenizer = hf.from_tokenizer(tokenizer, eos_token=sorted(stop_ids))
        self._marks = marks
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # by grammar; last used: last

    def guide(
        self, structure: Structure, prompt_ids: Sequence[int], stop_ids: frozenset[int]
    ) -> "Guide":
        """Make what follows one answer.

        Args:
            structure: what the answer must look like.
            prompt_ids: what it answers; tells whether the answer begins inside thinking.
            stop_ids: what ends it: the target's own, and the request's, which may come where those
                may.

        Raises:
            ValueError: the grammar cannot be compiled.
        """
        marks = self._marks if structure.after_thinking else Marks()
        is_thinking = thinks_at_end(prompt_ids, marks)
        if is_thinking is False:  # the prompt has closed it
            marks = Marks()
        num_words = -(-self._tokenizer.vocab_size // 32)
        matcher = self._matcher(structure.grammar)
        return Guide(matcher, num_words, marks, bool(is_thinking), stop_ids)

    def _matcher(self, grammar: str) -> "LLMatcher":
        """Compile a grammar, or copy what was compiled; a copy costs some microseconds."""
        from llguidance import LLMatcher

        if grammar not in self._compiled:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(reason(matcher.get_error()))
            self._compiled[grammar] = matcher
            if len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].deep_copy()


class Guide:
    """Follows one answer through its grammar.

    `follow` goes behind what is committed; `take` goes on along drafts, until the next `follow`.

    Args:
        matcher: that nothing has gone through.
        num_words: of its bits.
        marks: of thinking that may come before the answer; without any, none may.
        is_thinking: whether the answer begins inside it.
        stop_ids: see `Grammars.guide`.

    Attributes:
        stop_ids: that end the answer; nothing is taken behind one.
        problem: why the answer cannot be followed any further; None: it can.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        num_words: int,
        marks: Marks,
        is_thinking: bool,
        stop_ids: frozenset[int],
    ) -> None:
        self._fresh, self._matcher = matcher, matcher.deep_copy()
        self.num_words = num_words
        self._marks, self.stop_ids = marks, stop_ids
        self._first: _Part = "thinking" if is_thinking else "opening" if marks.start else "answer"
        self._part = self._first
        self._said: list[int] = []  # drafts included
        self._before: list[_Part] = []  # by draft, where it stood
        self.problem: str | None = None

    def follow(self, token_ids: Sequence[int]) -> None:
        """Go behind the committed tokens; those of the last time are the beginning of these."""
        self._take_back()
        if self._matcher.is_error() and self.problem is None:  # drafts went past its limits
            self._matcher, self._said, self._part = self._fresh.deep_copy(), [], self._first
        for token in token_ids[len(self._said) :]:
            self.take(token)
        self._before.clear()
        if self._matcher.is_error() and self.problem is None:
            self.problem = reason(self._matcher.get_error())

    def take(self, token: int) -> None:
        """Go on by one token that `bits_of` allows."""
        start, end = self._marks
        self._before.append(self._part)
        if self._part == "opening" and token != start[len(self._said)]:
            self._part = "answer"
        if self._part == "answer":
            self._matcher.consume_token(token)
        self._said.append(token)
        if self._part == "opening" and len(self._said) == len(start):
            self._part = "thinking"
        elif self._part == "thinking" and tuple(self._said[-len(end) :]) == end:
            self._part = "answer"

    @property
    def is_thinking(self) -> bool:
        """Whether any token may come, since the answer has not begun."""
        return self._part == "thinking"

    @property
    def matcher(self) -> "LLMatcher":
        """What stands behind all that was taken; it alone does not know of thinking."""
        return self._matcher

    def completed(self, bits: Bits) -> Bits | None:
        """Complete what the matcher lets come; None: any.

        Where nothing but the end is left, only stop tokens are.
        """
        if self._matcher.is_error():
            if not self._before:  # else only the drafts went too far
                self.problem = self.problem or reason(self._matcher.get_error())
            return None
        if self._matcher.is_accepting():
            _let(bits, self.stop_ids)
        if self._part == "opening":
            mark = self._marks.start[len(self._said)]
            if self._said:
                bits[:] = 0
            _let(bits, [mark])
        return bits

    def forced(self) -> list[int]:
        """List tokens that must come next, as the tokenizer would write what is forced."""
        return list(self._matcher.compute_ff_tokens()) if self._part == "answer" else []

    def is_whole(self, token_ids: Sequence[int]) -> bool:
        """Whether an answer may end behind these tokens, without its stop token."""
        self.follow(token_ids)
        return self._part == "answer" and self.problem is None and self._matcher.is_accepting()

    def _take_back(self) -> None:
        """Make the drafts not have happened."""
        if not self._before:
            return
        num_drafts = len(self._before)
        parts = [*self._before[1:], self._part]  # where each stood once it was said
        # The mark that ends the thinking, too, stands in the answer, and went through no matcher.
        matched = sum(
            after == "answer" and before != "thinking"
            for before, after in zip(self._before, parts, strict=True)
        )
        self._matcher.rollback(matched)
        self._part = self._before[0]
        del self._said[-num_drafts:]
        self._before.clear()


def thinks_at_end(prompt_ids: Sequence[int], marks: Marks) -> bool | None:
    """Tell whether a prompt ends inside thinking, or behind it (False); None: there is no mark."""
    length = max(len(marks.start), len(marks.end)) + _BLANKS
    tail = tuple(prompt_ids[-length:])
    opened, closed = (_last(tail, mark) for mark in marks)
    return None if opened == closed else opened > closed


def reason(error: str) -> str:
    """Take the first line of llguidance's error, which goes on with the state of its parser."""
    return (error.strip().splitlines() or ["unknown"])[0]


def has(bits: Bits | None, token: int) -> bool:
    """Whether a token is among those that may come; None: any is."""
    return bits is None or (token // 32 < len(bits) and bool(bits[token // 32] >> token % 32 & 1))


def bits_of(guides: Sequence[Guide | None]) -> list[Bits | None]:
    """Tell which tokens may come next behind each of some guides over one tokenizer.

    Threads of llguidance work for all of them at once.

    Returns:
        By guide; None: any may, or there is no guide.
    """
    found: list[Bits | None] = [None] * len(guides)
    asked = [(n, guide) for n, guide in enumerate(guides) if guide and not guide.is_thinking]
    if not asked:
        return found
    bits = np.empty((len(asked), asked[0][1].num_words), dtype=np.uint32)
    rows = [(guide.matcher, row) for row, (_, guide) in enumerate(asked)]
    _executor().unsafe_compute_mask_ptr(rows, bits.ctypes.data, bits.strides[0], len(asked))
    for row, (n, guide) in zip(bits, asked, strict=True):
        found[n] = guide.completed(row)
    return found


@lru_cache(1)
def _executor() -> "LLExecutor":
    """Make the threads that masks are computed in."""
    from llguidance import LLExecutor

    return LLExecutor()


def _last(tokens: Sequence[int], mark: Sequence[int]) -> int:
    """Find where a mark stands last; -1: nowhere."""
    places = range(len(tokens) - len(mark), -1, -1) if mark else ()
    return next((at for at in places if tuple(tokens[at : at + len(mark)]) == tuple(mark)), -1)


def _let(bits: Bits, tokens: Iterable[int]) -> None:
    """Let more tokens come; one that the bits have no place for is left out."""
    for token in tokens:
        if token // 32 < len(bits):
            bits[token // 32] |= np.uint32(1 << token % 32)
