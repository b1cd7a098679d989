"""How requests steer their answers, as arrays of one round."""

from collections.abc import Sequence as ListLike
from itertools import zip_longest
from typing import NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from dspark_batch.numerics.steering import (
    ANY,
    NOBODY,
    Counted,
    Edits,
    Penalties,
    Steering,
    Words,
)
from dspark_batch.types import Request, Sampling

_FOR_EVER = 2**31 - 1
_NEUTRAL = Sampling()

Edit: TypeAlias = tuple[int, float, int]  # a token, what is added, until which answer position


class Wish(NamedTuple):
    """What one request wants changed; made once, when it is admitted."""

    sampling: Sampling
    edits: tuple[Edit, ...]
    words: tuple[tuple[int, ...], ...]  # the tokens of each bad word
    prompt_ids: np.ndarray  # int32, each once; empty: nobody looks at them


class Answer(NamedTuple):
    """A wish, and the answer so far."""

    wish: Wish
    token_ids: ListLike[int]


def wish_of(
    request: Request, words: ListLike[ListLike[int]], stop_ids: frozenset[int], vocab_size: int
) -> Wish | None:
    """Say what a request wants changed; None: nothing.

    Args:
        request: what was asked.
        words: the tokens of its bad words.
        stop_ids: the target's own, which `min_tokens` holds back too.
        vocab_size: there are no logits of tokens from here on, so nobody may change them.
    """
    sampling = request.sampling
    if not sampling.steers:
        return None
    stops = stop_ids | sampling.stop_ids if sampling.min_tokens else frozenset[int]()
    held_back = sorted(token for token in stops if token < vocab_size)
    until = min(sampling.min_tokens, _FOR_EVER)
    edits = [(token, bias, _FOR_EVER) for token, bias in sampling.logit_bias]
    edits += [(token, -np.inf, until) for token in held_back]
    looks_back = sampling.repetition_penalty != 1
    prompt_ids = np.unique(np.array(request.prompt_ids if looks_back else (), dtype=np.int32))
    return Wish(sampling, tuple(edits), tuple(tuple(word) for word in words), prompt_ids)


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
    )


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
