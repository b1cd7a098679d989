"""Drafts that are looked up: what followed in the text when it last read as it does now.

No model runs. Where an answer copies its prompt or itself, the text knows what comes next.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dspark_batch.drafters.plain import NoDrafter

LEAST_MATCH = 3  # tokens that must agree; two agree by chance too often
LONGEST_MATCH = 8  # more of them say no more
_MOST_PLACES = 8  # that are compared, the latest first


class Found(NamedTuple):
    """What followed an earlier place that reads like the end of the text."""

    tokens: list[int]
    match: int  # tokens in front of both that agree, up to LONGEST_MATCH


class Judged(NamedTuple):
    """How well something found told what came."""

    match: int
    right: int  # tokens that came as found, until the first other one
    seen: int  # tokens that could be compared, that other one included


class TextIndex:
    """Finds earlier places of a growing text that read like its end.

    It takes some hundred bytes for each token, where a KV cache takes many thousands.

    Args:
        tokens: of the text so far.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # LEAST_MATCH tokens -> where they last ended
        # By place: where the same tokens ended before; -1: nowhere, as at the first places.
        self._before = [-1] * (LEAST_MATCH - 1)
        self._found: Found | None = None  # since the text last grew
        self.add(tokens)

    def __len__(self) -> int:
        """Count the tokens of the text."""
        return len(self._tokens)

    def add(self, tokens: Sequence[int]) -> Judged | None:
        """Let the text go on; say how well that was found before; None: nothing was."""
        found, self._found = self._found, None
        self._tokens += tokens
        begin = len(self._before)
        new = self._tokens[begin + 1 - LEAST_MATCH :]
        keys = zip(*(new[n:] for n in range(LEAST_MATCH)), strict=False)
        for end, key in enumerate(keys, begin):
            self._before.append(self._latest.get(key, -1))
            self._latest[key] = end
        return None if found is None else _judged(found, tokens)

    def find(self, count: int) -> Found | None:
        """Find what is likely to follow, by the longest match, the latest among equals.

        Args:
            count: tokens to propose, at least 1. Where the text ends before, it is read on as if it
                repeated itself.

        Returns:
            None: nothing in the text reads like its end.
        """
        if self._before[-1] < 0:
            return None
        best, most, place = 0, 0, self._before[-1]
        for _ in range(_MOST_PLACES):
            match = self._match(place)
            if match > most:
                best, most = place, match
            place = self._before[place]
            if place < 0 or most == LONGEST_MATCH:
                break
        followed = self._tokens[best + 1 : best + 1 + count]
        while len(followed) < count:
            followed += followed[: count - len(followed)]
        self._found = Found(followed, most)
        return self._found

    def _match(self, place: int) -> int:
        """Count the tokens up to a place that agree with the last ones of the text."""
        tokens, match, longest = self._tokens, LEAST_MATCH, min(LONGEST_MATCH, place + 1)
        while match < longest and tokens[place - match] == tokens[-1 - match]:
            match += 1
        return match


def _judged(found: Found, came: Sequence[int]) -> Judged:
    pairs = list(zip(found.tokens, came, strict=False))  # either may be shorter
    right = next((n for n, (told, token) in enumerate(pairs) if told != token), len(pairs))
    return Judged(found.match, right, min(right + 1, len(pairs)))


class OnlyLookUps(NoDrafter):
    """No drafter either, but rounds have room for tokens that are looked up."""

    block_size = 8
