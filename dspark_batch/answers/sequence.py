"""The growing answer of one request."""

import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from math import isfinite
from typing import NamedTuple

from dspark_batch.answers.steering import Wish
from dspark_batch.answers.stopping import StopStrings
from dspark_batch.drafters.lookup import TextIndex
from dspark_batch.types import (
    Completion,
    FinishReason,
    Logprobs,
    Partial,
    Request,
    Structured,
    drafted_flags,
)


class Score(NamedTuple):
    """What the target thought of one token; log-probabilities."""

    chosen: float
    top_ids: ListLike[int]  # the likeliest first
    top: ListLike[float]


class Sequence:
    """What the engine knows of one request while it decodes.

    Attributes:
        token_ids: the committed tokens, a stop token included.
        finish_reason: None while more may come.
        fallback: why it is decoded plainly; None while the drafter serves it.
        num_cached: prompt tokens that came from the prefix cache.
        has_context: whether the drafter's context holds all of it; a drafter that rests loses it.
        is_urgent: whether it goes before others.
        is_cancelled: whether nobody wants it any more; its prompt may still be on its way.
        wish: how the logits of its tokens are changed; None: they are not.
        text: of prompt and answer, in which drafts are looked up; None: nobody has yet.
        told: scores that prefill gave, of the prompt's tokens and of an answer that was given.
    """

    def __init__(
        self,
        request: Request,
        stop_ids: frozenset[int],
        stop_strings: StopStrings | None = None,
        *,
        wish: Wish | None = None,
        is_urgent: bool = False,
    ) -> None:
        self.request = request
        self.wish = wish
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.fallback: str | None = None
        self.num_cached = 0
        self.has_context = True
        self.is_urgent = is_urgent
        self.is_cancelled = False
        self.text: TextIndex | None = None
        self.told: ListLike[Score] = ()
        self._stop_ids = request.sampling.endings(stop_ids)
        self._stop_strings = stop_strings
        # By round: accept length, drafts among it, drafts verified, and their confidence.
        self._rounds: list[tuple[int, int, int, tuple[float, ...] | None]] = []
        self._looked_up = (0, 0)  # drafts out of the text: verified, accepted
        self._scores: list[Score] = []  # by token, if it was asked for
        self._admitted_s = time.perf_counter()
        self._seated_s = self._last_token_s = self._admitted_s

    @property
    def is_served(self) -> bool:
        """Whether the drafter can draft for it."""
        return self.fallback is None and self.has_context

    @property
    def cannot_go_on(self) -> str | None:
        """Why its grammar cannot be followed any further; None: it can, or there is none."""
        guide = self.wish.guide if self.wish else None
        return guide.problem if guide else None

    def forced(self) -> list[int]:
        """List the tokens that its grammar forces next; []: none, or it has no grammar."""
        guide = self.wish.guide if self.wish else None
        if guide is None:
            return []
        guide.follow(self.token_ids)
        return guide.forced()

    @property
    def cached_len(self) -> int:
        """Tokens in the cache: the prompt and all that is committed, but the anchor."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1

    @property
    def num_left(self) -> int:
        """Tokens that it may have besides."""
        return self.request.max_tokens - len(self.token_ids)

    @property
    def is_told_numbers(self) -> bool:
        """Whether the scores of prefill are numbers, as far as there are any."""
        return all(isfinite(score.chosen) for score in self.told)

    def begin(self, token: int, scores: ListLike[Score] = ()) -> None:
        """Commit the first token, which prefill gives, and its score, if it was asked for.

        An answer that was given is committed whole, and is at its end.
        """
        self._seated_s = self._last_token_s = time.perf_counter()
        if self.request.given is not None:
            self.token_ids = list(self.request.given.token_ids)
            self.finish_reason = "scored"
            return
        self._commit([token])
        self._scores += scores

    def seat(self) -> None:
        """Begin to decode in a slot."""
        self._seated_s = time.perf_counter()

    def advance(
        self,
        accepted: ListLike[int],
        bonus: int,
        num_drafted: int,
        confidence: ListLike[float] | None = None,
        scores: ListLike[Score] = (),
    ) -> int:
        """Commit a round: the accepted drafts, then the bonus; return how many tokens stayed.

        A stop token, or the token that completes a stop string, ends the answer where it stands,
        and the limit cuts inside the block, so that exactly the tokens and the finish reason of
        plain decoding come out.
        """
        stayed = self._commit([*accepted, bonus])
        self._scores += scores[:stayed]
        self._last_token_s = time.perf_counter()
        known = None if confidence is None else tuple(confidence[:num_drafted])
        self._rounds.append((stayed, min(stayed, len(accepted)), num_drafted, known))
        return stayed

    def count_look_up(self, num_drafted: int, num_accepted: int) -> None:
        """Note that drafts of the last round were looked up."""
        drafted, accepted = self._looked_up
        self._looked_up = drafted + num_drafted, accepted + num_accepted

    def logprobs(self, text_of: Callable[[int], str]) -> Logprobs | None:
        """Tell the log-probabilities, if they were asked for; `text_of` decodes one token."""
        scores: ListLike[Score] = self._scores
        if self.request.given is not None:
            scores = self.told[len(self.told) - len(self.token_ids) :]
        return _logprobs(self.token_ids, scores, self.request.sampling.logprobs, text_of)

    def prompt_logprobs(self, text_of: Callable[[int], str]) -> Logprobs | None:
        """Tell those of the prompt, if they were asked for."""
        ids = self.request.prompt_ids
        scores = self.told[: len(ids) - 1]
        return _logprobs(ids, scores, self.request.sampling.prompt_logprobs, text_of)

    def completion(
        self, text: str, logprobs: Logprobs | None = None, prompt_logprobs: Logprobs | None = None
    ) -> Completion:
        """Describe the finished answer, whose spoken tokens decode to `text`."""
        if self.finish_reason is None:
            raise ValueError(f"{self.request.item.where}: the answer is not finished")
        rounds = zip(*self._rounds, strict=True) if self._rounds else [()] * 4
        accept_lengths, num_accepted, num_drafted, confidence = rounds
        said = self._stop_strings.cut(text) if self._stop_strings else text
        return Completion(
            item=self.request.item,
            text=said,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt_ids),
            accept_lengths=accept_lengths,
            num_accepted=num_accepted,
            num_drafted=num_drafted,
            looked_up=self._looked_up,
            confidence=None if None in confidence else confidence or None,
            fallback=self.fallback,
            cached_tokens=self.num_cached,
            prefill_s=self._seated_s - self._admitted_s,
            decode_s=self._last_token_s - self._seated_s,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structure=self._structured(text[len(said) :]),
        )

    def _structured(self, lost: str) -> Structured | None:
        """Tell whether the answer is whole, if it has a grammar; `lost` was cut off its end."""
        structure, guide = self.request.sampling.structure, self.wish and self.wish.guide
        if structure is None or guide is None:
            return None
        is_cut = lost.strip() if structure.kind == "json_schema" else lost  # blanks are no JSON
        return Structured(structure.kind, not is_cut and guide.is_whole(self.spoken_ids()))

    def partial(self, text_of: Callable[[int], str]) -> Partial:
        """Tell what is committed so far; `text_of` decodes one token."""
        lengths = [length for length, *_ in self._rounds]
        accepted = [num_accepted for _, num_accepted, *_ in self._rounds]
        flags = drafted_flags(lengths, accepted)
        return Partial(tuple(self.token_ids), flags, self.logprobs(text_of))

    def spoken_ids(self) -> list[int]:
        """List the committed tokens without the stop token that ended the answer."""
        ended = self.token_ids and self.token_ids[-1] in self._stop_ids
        return self.token_ids[:-1] if ended else self.token_ids

    def _commit(self, tokens: list[int]) -> int:
        room, strings = self.num_left, self._stop_strings
        stayed = 0
        for token in tokens[:room]:
            self.token_ids.append(token)
            stayed += 1
            if token in self._stop_ids or (strings is not None and strings.add(token)):
                self.finish_reason = "stop"
                return stayed
        if stayed == room:
            self.finish_reason = "length"
        return stayed


def _logprobs(
    ids: ListLike[int],
    scores: ListLike[Score],
    num_top: int | None,
    text_of: Callable[[int], str],
) -> Logprobs | None:
    """Write the scores of the last of some tokens; those before them have none."""
    if num_top is None:
        return None
    top_ids = [token for score in scores for token in score.top_ids[:num_top]]
    top = [logprob for score in scores for logprob in score.top[:num_top]]
    without: list[float | None] = [None] * (len(ids) - len(scores))
    return Logprobs(
        tuple(ids),
        tuple(map(text_of, ids)),
        (*without, *(score.chosen for score in scores)),
        tuple(top_ids),
        tuple(map(text_of, top_ids)),
        tuple(top),
    )
