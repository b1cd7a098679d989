"""What a request wants said more, less or not at all: its changes of the logits.

A change may depend on the answer before a position, and behind the anchor that answer goes on along
the drafts. So row j of a verify pass counts the committed tokens and the first j drafts, and never
a draft behind it: a draft that is rejected later has changed nothing that stays.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import mlx.core as mx

ANY, NOBODY = -1, -2  # in `Words`: fits every token; is no token


# Drafts [B, D], the first row, the shape [B, W, V] of the logits, and whether drafts are chosen ->
# the tokens that may come, [B, W, ceil(V / 32)] uint32, a bit for each, lowest first; None: any.
Allowed: TypeAlias = Callable[[mx.array, int, tuple[int, ...], bool], mx.array | None]


class Edits(NamedTuple):
    """What is added to single logits, up to some answer position; N for each slot."""

    ids: mx.array  # [B, N] int32, tokens; different ones, but where a value is -inf or 0
    values: mx.array  # [B, N] float32; -inf: the token may not come; 0: nothing
    until: mx.array  # [B, N] int32, the answer position from which on it does not hold


class Words(NamedTuple):
    """Sequences of tokens that may not be completed; M for each slot, P tokens at most."""

    begins: mx.array  # [B, M, P-1] int32, what comes before the last token; ANY in front of it
    last: mx.array  # [B, M] int32
    tail: mx.array  # [B, P-1] int32, the end of the answer; NOBODY in front of it
    holds: mx.array  # [B, M] bool; False: the slot has fewer words


class Counted(NamedTuple):
    """Tokens that are there; N for each slot."""

    ids: mx.array  # [B, N] int32
    weights: mx.array  # [B, N] float32; 0: the slot has fewer

    def by_token(self, vocab_size: int) -> mx.array:
        """Count each token of the vocabulary, [B, V] float32."""
        zeros = mx.zeros((self.ids.shape[0], 1, vocab_size))
        return _added(zeros, self.ids[:, None], self.weights[:, None])[:, 0]


class Penalties(NamedTuple):
    """What tokens lose that were said before."""

    repetition: mx.array  # [B] float32, divides a logit above 0, multiplies one below; 1: none
    frequency: mx.array  # [B] float32, taken off for each time in the answer
    presence: mx.array  # [B] float32, taken off once
    answer: Counted  # what is committed of it
    prompt: Counted  # of the slots where it counts


class Steering(NamedTuple):
    """The changes of one round. A slot without any keeps its logits, as float32."""

    positions: mx.array  # [B] int32, answer tokens that are committed
    edits: Edits | None = None  # None: no slot has any; so for the others
    words: Words | None = None
    penalties: Penalties | None = None
    allowed: Allowed | None = None

    def __call__(
        self, logits: mx.array, drafts: mx.array, first: int = 0, *, is_draft: bool = False
    ) -> mx.array:
        """Change logits in vLLM's order: words, single tokens, penalties; then what is allowed.

        What is allowed goes before all else: where a word may not be said and nothing else is left,
        it is said.

        Args:
            logits: [B, W, V]; row i stands behind the first `first` + i drafts.
            drafts: [B, D] int32, with D >= first + W - 1.
            first: see above.
            is_draft: whether these are a drafter's, so that a token is only proposed.

        Returns:
            [B, W, V] float32, -inf for what may not come.

        Source:
            vLLM, `v1/sample/sampler.py`.
        """
        steered = logits.astype(mx.float32)
        rows = mx.arange(first, first + logits.shape[1])
        if self.words is not None:
            steered = _without_words(steered, drafts, rows, self.words)
        if self.edits is not None:
            ids, values, until = self.edits
            holds = (self.positions[:, None] + rows)[..., None] < until[:, None]
            steered = _added(steered, ids[:, None], mx.where(holds, values[:, None], 0.0))
        if self.penalties is not None:
            steered = _penalised(steered, drafts, rows, self.penalties)
        if self.allowed is None:
            return steered
        mx.async_eval(steered)  # the device makes them while the host asks the grammars
        bits = self.allowed(drafts, first, logits.shape, is_draft)
        return steered if bits is None else self._restricted(steered, logits, bits, is_draft)

    def _restricted(
        self, steered: mx.array, logits: mx.array, bits: mx.array, is_draft: bool
    ) -> mx.array:
        """Leave what is allowed; see `__call__`."""
        is_allowed = _flags(bits, logits.shape[-1])
        left = mx.where(is_allowed, steered, -mx.inf)
        if is_draft:  # a drafter that knows none of the tokens may propose any
            return _or_else(left, steered)
        if self.words is None:
            return left
        return _or_else(left, mx.where(is_allowed, logits.astype(mx.float32), -mx.inf))


def _added(values: mx.array, ids: mx.array, changes: mx.array) -> mx.array:
    """Add changes [B, W, N] to values [B, W, V] at ids [B, W, N] or [B, 1, N]."""
    slots, width = mx.arange(values.shape[0]), mx.arange(values.shape[1])
    return values.at[slots[:, None, None], width[:, None], ids].add(changes)


def _without_words(logits: mx.array, drafts: mx.array, rows: mx.array, words: Words) -> mx.array:
    said = mx.concatenate([words.tail, drafts.astype(mx.int32)], axis=1)
    before = said[:, rows[:, None] + mx.arange(words.tail.shape[1])]  # [B, W, P-1]
    begins = words.begins[:, None]
    is_begun = ((begins == before[:, :, None]) | (begins == ANY)).all(axis=-1)
    banned = mx.where(is_begun & words.holds[:, None], -mx.inf, 0.0)
    return _added(logits, words.last[:, None], banned)


def _penalised(
    logits: mx.array, drafts: mx.array, rows: mx.array, penalties: Penalties
) -> mx.array:
    vocab_size = logits.shape[-1]
    counts = mx.broadcast_to(penalties.answer.by_token(vocab_size)[:, None], logits.shape)
    if drafts.shape[1]:
        come = (mx.arange(drafts.shape[1]) < rows[:, None]).astype(mx.float32)  # [W, D]
        come = mx.broadcast_to(come, (drafts.shape[0], *come.shape))
        counts = _added(counts, drafts[:, None], come)
    is_said, is_asked = counts > 0, penalties.prompt.by_token(vocab_size)[:, None] > 0
    repetition, frequency, presence = (p[:, None, None] for p in penalties[:3])
    factor = mx.where(is_said | is_asked, repetition, 1.0)
    logits = mx.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency * counts - presence * is_said


def _flags(bits: mx.array, vocab_size: int) -> mx.array:
    """Spread bits [B, W, N] over the vocabulary, [B, W, V] bool."""
    flags = (bits[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return flags.reshape(*bits.shape[:2], -1)[..., :vocab_size].astype(mx.bool_)


def _or_else(logits: mx.array, others: mx.array) -> mx.array:
    """Take other logits where nothing is left of these."""
    return mx.where((logits > -mx.inf).any(axis=-1, keepdims=True), logits, others)
