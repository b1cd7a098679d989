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
    """

    def __init__(self, stops: Sequence[str], decode: Decode) -> None:
        self._stops = tuple(stops)
        self._decode = decode
        self._reach = max(map(len, stops)) + _SLACK
        self._token_ids: list[int] = []
        self._start = 0  # of the tokens that a stop string may still begin in

    def add(self, token: int) -> bool:
        """Take the next token and tell whether it completes a stop string."""
        self._token_ids.append(token)
        if self._is_in(self._text(self._start)):
            return self._is_in(self._text(0))
        self._forget()
        return False

    def cut(self, text: str) -> str:
        """Cut a text before the earliest stop string, if it has one."""
        return text[: min((at for s in self._stops if (at := text.find(s)) >= 0), default=None)]

    def _forget(self) -> None:
        """Drop half of the tokens that are looked at when the other half reaches far enough."""
        middle = (self._start + len(self._token_ids)) // 2
        if middle - self._start >= self._reach and len(self._text(middle)) >= self._reach:
            self._start = middle

    def _text(self, start: int) -> str:
        return self._decode(self._token_ids[start:])

    def _is_in(self, text: str) -> bool:
        return any(stop in text for stop in self._stops)
