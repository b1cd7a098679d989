"""How requests steer their answers, as arrays of one round."""

from collections.abc import Sequence as ListLike
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from dspark_batch.models.grammar import Bits, Guide, bits_of, has
from dspark_batch.numerics.steering import (
    ANY,
    NOBODY,
    Counted,
    Edits,
    Penalties,
    Steering,
    Words,
)
from dspark_batch.pair import Pair
from dspark_batch.types import Request, Sampling

_FOR_EVER = 2**31 - 1
_NEUTRAL = Sampling()
_ANY_TOKEN = 2**32 - 1  # as bits

Edit: TypeAlias = tuple[int, float, int]  # a token, what is added, until which answer position


class Wish(NamedTuple):
    """What one request wants changed; made once, when it is admitted."""

    sampling: Sampling
    edits: tuple[Edit, ...]
    words: tuple[tuple[int, ...], ...]  # the tokens of each bad word
    prompt_ids: np.ndarray  # int32, each once; empty: nobody looks at them
    guide: Guide | None = None  # through the grammar of the answer


class Answer(NamedTuple):
    """A wish, and the answer so far."""

    wish: Wish
    token_ids: ListLike[int]


def wish_of(pair: Pair, request: Request) -> Wish | None:
    """Say what a request wants changed; None: nothing.

    Raises:
        ModelError: it needs a tokenizer, and there is none.
        ValueError: its grammar does not go with this tokenizer.
    """
    sampling, stop_ids = request.sampling, pair.config.stop_ids
    if not sampling.steers:
        return None
    words = pair.reader.spellings(sampling.bad_words) if sampling.bad_words else []
    vocab_size = pair.target.facts.vocab_size  # there are no logits of tokens from here on
    stops = stop_ids | sampling.stop_ids if sampling.min_tokens else frozenset[int]()
    held_back = sorted(token for token in stops if token < vocab_size)
    until = min(sampling.min_tokens, _FOR_EVER)
    edits = [(token, bias, _FOR_EVER) for token, bias in sampling.logit_bias]
    edits += [(token, -np.inf, until) for token in held_back]
    looks_back = sampling.repetition_penalty != 1
    prompt_ids = np.unique(np.array(request.prompt_ids if looks_back else (), dtype=np.int32))
    guide = guide_of(pair, request)
    return Wish(sampling, tuple(edits), tuple(tuple(word) for word in words), prompt_ids, guide)


def guide_of(pair: Pair, request: Request) -> Guide | None:
    """Make what follows the answer through its grammar; None: it has none.

    Raises:
        ValueError: the grammar does not go with this tokenizer.
    """
    sampling = request.sampling
    if sampling.structure is None:
        return None
    grammars = pair.reader.grammars
    stop_ids = sampling.endings(pair.config.stop_ids)
    return grammars.guide(sampling.structure, request.prompt_ids, stop_ids)


def steering_of(slots: ListLike[Answer | None]) -> Steering:
    """Gather what the slots of a round want; None: nothing."""
    nothing = Wish(_NEUTRAL, (), (), np.empty(0, dtype=np.int32))
    steered = [slot or Answer(nothing, ()) for slot in slots]
    wishes = [slot.wish for slot in steered]
    return Steering(
        mx.array([len(slot.token_ids) for slot in steered]),
        _edits(wishes) if any(wish.edits for wish in wishes) else None,
        _words(steered) if any(wish.words for wish in wishes) else None,
        _penalties(steered) if any(w.sampling.has_penalties for w in wishes) else None,
        _Allowed(steered) if any(wish.guide is not None for wish in wishes) else None,
    )


class _Allowed:
    """Asks the grammars which tokens may come, along the drafts of one round.

    A row is asked for once: what a draft was chosen from is what it is verified against.
    """

    def __init__(self, slots: ListLike[Answer]) -> None:
        self._walks = [_Walk(s.wish.guide, s.token_ids) if s.wish.guide else None for s in slots]
        self._rows: list[np.ndarray] = []  # [S, ceil(V / 32)] uint32 each, behind so many drafts
        self._is_free: list[bool] = []  # by row, whether any token may come everywhere

    def __call__(
        self, drafts: mx.array, first: int, shape: tuple[int, ...], is_draft: bool
    ) -> mx.array | None:
        """Tell which tokens may come; see `numerics.steering.Allowed`."""
        _, width, vocab_size = shape
        if len(self._rows) < first + width:
            self._ask(drafts, first + width, -(-vocab_size // 32))
        if all(self._is_free[first : first + width]):
            return None
        if is_draft:  # of one row, the last
            return mx.array(self._forced(self._rows[first])[:, None])
        return mx.array(np.stack(self._rows[first : first + width], axis=1))

    def _ask(self, drafts: mx.array, num_rows: int, num_words: int) -> None:
        """Ask for rows, each behind one draft more."""
        said: Any = drafts.tolist() if num_rows > 1 else []
        for row in range(len(self._rows), num_rows):
            for slot, walk in enumerate(self._walks):
                if walk is not None:
                    walk.go(said[slot][row - 1] if row else None)
            found = bits_of([walk.guide if walk else None for walk in self._walks])
            bits = np.full((len(found), num_words), _ANY_TOKEN, dtype=np.uint32)
            for slot, (walk, each) in enumerate(zip(self._walks, found, strict=True)):
                if walk is not None:
                    walk.stand(each)
                if each is not None:
                    most = min(len(each), num_words)
                    bits[slot, :most], bits[slot, most:] = each[:most], 0
            self._rows.append(bits)
            self._is_free.append(all(each is None for each in found))

    def _forced(self, row: np.ndarray) -> np.ndarray:
        """Let a draft only be what must come, where that is known; row [S, ceil(V / 32)]."""
        forced = [(n, walk.forced()) for n, walk in enumerate(self._walks) if walk is not None]
        row = row.copy()
        for slot, token in forced:
            if token is not None and token // 32 < row.shape[1]:
                row[slot] = 0
                row[slot, token // 32] = 1 << token % 32
        return row


class _Walk:
    """The way of one answer along the drafts of a round."""

    def __init__(self, guide: Guide, token_ids: ListLike[int]) -> None:
        guide.follow(token_ids)
        self._guide = guide
        self._goes_on = True
        self._forced: list[int] = []  # tokens that must come next
        self._bits: Bits | None = None

    @property
    def guide(self) -> Guide | None:
        """Who says what may come next; None: nobody asks.

        A draft may not come, then, or has ended the answer.
        """
        return self._guide if self._goes_on else None

    def go(self, draft: int | None) -> None:
        """Go on behind a draft; None: stand behind the anchor."""
        if draft is None or not self._goes_on:
            return
        self._goes_on = draft not in self._guide.stop_ids and has(self._bits, draft)
        if self._goes_on:
            self._guide.take(draft)
        self._forced = self._forced[1:] if self._forced[:1] == [draft] else []

    def stand(self, bits: Bits | None) -> None:
        """Hear what may come next; None: any."""
        self._bits = bits

    def forced(self) -> int | None:
        """Tell the token that must come next; None: several may, or nobody asks."""
        if self._bits is None:
            return None
        self._forced = self._forced or self._guide.forced()
        return self._forced[0] if self._forced else None


def _edits(wishes: ListLike[Wish]) -> Edits:
    rows = zip(*zip_longest(*(wish.edits for wish in wishes), fillvalue=(0, 0.0, 0)), strict=True)
    ids, values, until = zip(*(zip(*row, strict=True) for row in rows), strict=True)
    return Edits(mx.array(ids), mx.array(values), mx.array(until))


def _words(steered: ListLike[Answer]) -> Words:
    most = max(len(slot.wish.words) for slot in steered)
    reach = max(len(word) for slot in steered for word in slot.wish.words) - 1
    begins = np.full((len(steered), most, reach), ANY, dtype=np.int32)
    last = np.zeros((len(steered), most), dtype=np.int32)
    tail = np.full((len(steered), reach), NOBODY, dtype=np.int32)
    holds = np.zeros((len(steered), most), dtype=np.bool_)
    for slot, (wish, token_ids) in enumerate(steered):
        end = token_ids[-reach:] if reach else []
        tail[slot, reach - len(end) :] = end
        for n, (*before, token) in enumerate(wish.words):
            begins[slot, n, reach - len(before) :] = before
            last[slot, n], holds[slot, n] = token, True
    return Words(*map(mx.array, (begins, last, tail, holds)))


def _penalties(steered: ListLike[Answer]) -> Penalties:
    samplings = [slot.wish.sampling for slot in steered]
    said = [slot.token_ids if slot.wish.sampling.has_penalties else () for slot in steered]
    asked = [slot.wish.prompt_ids for slot in steered]
    return Penalties(
        mx.array([float(s.repetition_penalty) for s in samplings]),
        mx.array([float(s.frequency_penalty) for s in samplings]),
        mx.array([float(s.presence_penalty) for s in samplings]),
        _counted(said),
        _counted(asked),
    )


def _counted(tokens: "ListLike[ListLike[int] | np.ndarray]") -> Counted:
    most = max(map(len, tokens))
    ids = np.zeros((len(tokens), most), dtype=np.int32)
    weights = np.zeros((len(tokens), most), dtype=np.float32)
    for slot, some in enumerate(tokens):
        ids[slot, : len(some)], weights[slot, : len(some)] = some, 1
    return Counted(mx.array(ids), mx.array(weights))
