"""The text of an answer while its tokens come."""

from collections.abc import Callable, Sequence
from functools import cache

from dspark_batch.answers.stopping import cut

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for bytes that are no text


class TextStream:
    """Gives each part of a text once, as soon as no later token can change it.

    A token may end inside a character, and a text inside a stop string: both are held back.
    All tokens are decoded each time, since decoders treat the beginning of a text in their own way.

    Args:
        decode: turns token ids into text.
        stops: the text ends before the first of these.
        marks: whoever reads the text must see these whole; what may begin one is held back.
        min_tokens: a stop string that ends in the text of so many first tokens is none.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        marks: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._decode = decode
        self._is_broken = cache(lambda token: _BROKEN in decode([token]))
        self._stops, self._marks = tuple(stops), tuple(marks)
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._given = ""

    def add(self, *tokens: int) -> str:
        """Take the next tokens; return what is new of the text and stays, "" for nothing."""
        self._token_ids += tokens
        if not tokens or self._is_broken(tokens[-1]):  # a part of a character, or one in parts
            return ""
        return self._new(self._settled(self._decode(self._token_ids)))

    def end(self, text: str) -> str:
        """Return what is left of the whole text.

        A decoder that takes back what it said breaks the promise: then all of it, on a new line.
        """
        return text[len(self._given) :] if text.startswith(self._given) else f"\n{text}"

    def _new(self, settled: str) -> str:
        if not settled.startswith(self._given):
            return ""
        new, self._given = settled[len(self._given) :], settled
        return new

    def _settled(self, text: str) -> str:
        """Cut a text where a stop string begins, or may."""
        first = self._token_ids[: self._min_tokens]
        ends = [len(cut(text, self._stops, len(self._decode(first)) if first else 0))]
        ends += [len(text) - _overlap(text, held) for held in (*self._stops, *self._marks)]
        return text[: min(ends)]


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of a text with which a stop string begins."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
