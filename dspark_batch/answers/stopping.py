"""Stop strings, found in the text of tokens as they come."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_SLACK = 8  # characters: a decoder may treat the first ones of a text in its own way


class StopStrings:
    """Looks for stop strings in the text of one growing answer.

    The answer ends with the first token after which its text holds a stop string; the text itself
    ends before the earliest one. Tokens are added one by one, so where blocks end makes no
    difference. Only the end of the text is decoded each time, so an answer costs linear time.

    Args:
        stops: not empty, none of them empty.
        decode: turns token ids into text.
        min_tokens: a stop string that ends in the text of so many first tokens is none.
    """

    def __init__(self, stops: Sequence[str], decode: Decode, min_tokens: int = 0) -> None:
        self._stops = tuple(stops)
        self._decode = decode
        self._min_tokens = min_tokens
        self._reach = max(map(len, stops)) + _SLACK
        self._token_ids: list[int] = []
        self._start = 0  # of the tokens that a stop string may still begin in

    def add(self, token: int) -> bool:
        """Take the next token and tell whether it completes a stop string."""
        self._token_ids.append(token)
        recent = self._text(self._start)
        if any(stop in recent for stop in self._stops):
            text = self._text(0)
            if self.cut(text) != text:
                return True
        self._forget()
        return False

    def cut(self, text: str) -> str:
        """Cut a text before the earliest stop string, if it has one."""
        first = self._token_ids[: self._min_tokens]
        return cut(text, self._stops, len(self._decode(first)) if first else 0)

    def _forget(self) -> None:
        """Drop half of the tokens that are looked at when the other half reaches far enough."""
        middle = (self._start + len(self._token_ids)) // 2
        if middle - self._start >= self._reach and len(self._text(middle)) >= self._reach:
            self._start = middle

    def _text(self, start: int) -> str:
        return self._decode(self._token_ids[start:])


def cut(text: str, stops: Sequence[str], start: int = 0) -> str:
    """Cut a text before its earliest stop string that ends behind `start` characters, if any."""
    found = (text.find(stop, max(0, start + 1 - len(stop))) for stop in stops)
    return text[: min((at for at in found if at >= 0), default=None)]
