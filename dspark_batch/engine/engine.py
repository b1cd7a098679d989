"""The only loop: admit, round, commit."""

import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as ListLike
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from dspark_batch.engine.cache import RaggedCache
from dspark_batch.engine.fallback import (
    FAULTS,
    NOT_FINITE,
    DrafterFault,
    extend,
    is_sane,
    propose,
)
from dspark_batch.engine.prefill import prefill
from dspark_batch.engine.sampling import RULES, rule_of
from dspark_batch.engine.sequence import Sequence
from dspark_batch.engine.stopping import StopStrings
from dspark_batch.errors import UsageError
from dspark_batch.models.dspark import Draft
from dspark_batch.models.load import Pair
from dspark_batch.models.plain import NoDrafter
from dspark_batch.numerics.confidence import threshold_lengths
from dspark_batch.numerics.rules import Rule
from dspark_batch.types import Completion, Failure, Gauge, Outcome, Request, SamplingRule


class _Step(NamedTuple):
    """What one round gave, by slot; the free slots' part means nothing."""

    drafts: list[list[int]]
    verify_len: list[int]  # drafts that the target verified
    accepted: list[int]
    bonus: list[int]
    finite: list[list[bool]]  # by verified position: are the logits numbers?
    confidence: list[list[float]]  # by draft; empty if it is not logged
    is_sane: list[bool]  # were the drafts chosen from numbers?


class Engine:
    """Answers requests with a resident pair; owns the slots and their caches.

    Args:
        pair: target, tokenizer and drafter.
        slots: sequences that decode together.
        draft_length: drafts per round; None for the drafter's block, 0 for plain decoding.
        confidence_threshold: a block is verified up to its first draft below this; 0 for all.
        sampling: how requests with a temperature are drawn; both ways are exact.
        log_confidence: completions tell the confidence of every verified draft.

    Raises:
        UsageError: draft_length is more than the drafter's block, there is no confidence head, or
            nobody knows this sampling.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        slots: int = 1,
        draft_length: int | None = None,
        confidence_threshold: float = 0.0,
        sampling: SamplingRule = "coupled",
        log_confidence: bool = False,
    ) -> None:
        self._draft_length = _draft_length(pair, draft_length)
        if self._draft_length > 0 and not pair.drafter.has_confidence:
            _refuse_confidence(confidence_threshold, log_confidence)
        if self._draft_length == 0:
            pair = pair._replace(drafter=NoDrafter())
        self._pair = pair
        self._threshold = confidence_threshold
        self._sampling = _known_rule(sampling)
        self._log_confidence = log_confidence and self._draft_length > 0
        self._temperatures = _temperatures(pair, self._draft_length)
        self._num_layers = (pair.target.num_caches, pair.drafter.num_layers)
        self._cache, self._context = (RaggedCache(n, slots) for n in self._num_layers)
        self._anchors = mx.zeros(slots, dtype=mx.int32)
        self._sequences: list[Sequence | None] = [None] * slots  # by slot; None: free
        self._prefill_s = self._round_s = 0.0
        self._rounds = self._slot_rounds = 0  # of the engine; of all slots that were not free

    def generate(self, stream: Iterable[Request | Failure]) -> Iterator[Outcome]:
        """Answer a stream of requests, in the order in which answers finish.

        Pulls a request only when a slot is free for it; failures pass through.
        """
        pending = iter(stream)
        while True:
            yield from self._admit(pending)
            if not any(self._sequences):
                return
            yield from self._round()

    def gauge(self) -> Gauge:
        """Tell how full it is, and what it has spent."""
        return Gauge(
            busy_slots=self._slot_rounds / max(1, self._rounds),
            slots=len(self._sequences),
            memory_bytes=mx.get_active_memory(),
            peak_memory_bytes=mx.get_peak_memory(),
            prefill_s=self._prefill_s,
            round_s=self._round_s,
        )

    def _admit(self, pending: Iterator[Request | Failure]) -> Iterator[Outcome]:
        """Fill the free slots; what needs no round comes out at once."""
        while None in self._sequences:
            request = next(pending, None)
            if request is None:
                return
            yield from [request] if isinstance(request, Failure) else self._begin(request)

    def _begin(self, request: Request) -> Iterator[Outcome]:
        """Prefill a request into a free slot, unless its first token already ends it."""
        stops = self._stop_strings(request)
        sequence = Sequence(request, self._pair.config.stop_ids, stops)
        filled = prefill(self._pair, self._num_layers, request.prompt_ids)
        first = rule_of(self._sampling, [sequence]).first(filled.logits[None])[0]
        if not mx.isfinite(filled.logits).all().item():
            yield _not_finite(sequence)
            return
        sequence.fallback = filled.fallback
        outcome = self._advanced(sequence, partial(sequence.begin, first.item()))
        self._prefill_s += sequence.prefill_s
        if outcome is not None:
            yield outcome
            return
        slot = self._sequences.index(None)
        self._cache.insert(slot, filled.cache, sequence.cached_len)
        self._context.insert(slot, filled.context, sequence.cached_len)
        self._anchors[slot] = first
        self._sequences[slot] = sequence

    def _round(self) -> Iterator[Outcome]:
        """Draft, verify, accept and commit once for every active slot."""
        began = time.perf_counter()
        step = self._step()
        self._round_s += time.perf_counter() - began
        self._rounds += 1
        self._slot_rounds += sum(s is not None for s in self._sequences)
        for slot, sequence in enumerate(self._sequences):
            if sequence is None:
                continue
            outcome = self._advanced(sequence, partial(self._commit, step, slot, sequence))
            if outcome is not None:
                yield self._release(slot, outcome)

    def _commit(self, step: _Step, slot: int, sequence: Sequence) -> bool:
        """Commit a round to one slot; return whether what it committed came from numbers."""
        if not step.is_sane[slot]:
            sequence.fallback = sequence.fallback or NOT_FINITE
        stay = step.drafts[slot][: step.accepted[slot]]
        confidence = step.confidence[slot] if self._log_confidence else None
        stayed = sequence.advance(stay, step.bonus[slot], step.verify_len[slot], confidence)
        return all(step.finite[slot][:stayed])

    def _advanced(self, sequence: Sequence, advance: Callable[[], bool]) -> Outcome | None:
        """Let a sequence advance; return the outcome if that ends its answer."""
        try:
            if not advance():
                return _not_finite(sequence)
            return self._finished(sequence) if sequence.finish_reason is not None else None
        except _Undecodable as error:
            return _failure(sequence, f"the tokenizer cannot decode the answer ({error}).")

    def _step(self) -> "_Step":
        """Run drafter and target once over all slots and move the caches to the new anchors."""
        self._reserve()
        rule = rule_of(self._sampling, self._sequences)
        draft = self._propose(rule)
        sane = is_sane(draft)
        drafts, verify_len = self._choose_verified(draft, sane)
        tokens = mx.concatenate([self._anchors[:, None], drafts], axis=1)
        logits, features = self._pair.target(tokens, self._cache.layers)
        accepted, bonus = rule.verify(drafts, verify_len, logits)
        finite = mx.isfinite(logits).all(axis=-1)

        self._extend(features)
        active = mx.array([s is not None for s in self._sequences])
        count = mx.where(active, accepted + 1, 0)
        self._cache.keep(count)
        self._context.keep(count)
        self._anchors = bonus
        confidence = draft.confidence if self._log_confidence else drafts[:, :0]
        results = (drafts, verify_len, accepted, bonus, finite, confidence, sane)
        mx.eval(*results, self._cache.arrays(), self._context.arrays())
        return _Step(*(array.tolist() for array in results))

    def _reserve(self) -> None:
        """Make room for the anchor and the block of the slot that is furthest."""
        longest = max(s.cached_len for s in self._sequences if s is not None)
        self._cache.reserve(longest + 1 + self._draft_length)
        self._context.reserve(longest + 1 + self._pair.drafter.block_size)

    def _propose(self, rule: Rule) -> Draft:
        """Draft for all slots; nothing, where nobody is left whom the drafter serves."""
        drafter, none = self._pair.drafter, NoDrafter()
        if all(s is None or s.fallback for s in self._sequences):
            return none.propose(self._anchors, self._context, 0, rule.draft)
        try:
            return propose(drafter, self._anchors, self._context, self._draft_length, rule.draft)
        except DrafterFault as fault:
            self._fall_back(fault)
            return none.propose(self._anchors, self._context, 0, rule.draft)

    def _extend(self, features: mx.array | None) -> None:
        """Take the round's features into the drafter's context."""
        try:
            extend(self._pair.drafter, self._context, features)
        except DrafterFault as fault:
            self._fall_back(fault)

    def _fall_back(self, fault: DrafterFault) -> None:
        """Decode what is in flight plainly from here on; a pass is one for all slots."""
        for sequence in self._sequences:
            if sequence is not None:
                sequence.fallback = sequence.fallback or str(fault)

    def _choose_verified(self, draft: Draft, sane: mx.array) -> tuple[mx.array, mx.array]:
        """Return the drafts to send to the target, [S, l], and how many count per slot, [S]."""
        served = mx.array([s is not None and s.fallback is None for s in self._sequences])
        most = mx.where(served & sane, draft.tokens.shape[1], 0)
        if self._threshold <= 0 or draft.confidence is None:
            return draft.tokens, most
        verify_len = threshold_lengths(draft.confidence / self._temperatures, self._threshold)
        verify_len = mx.minimum(verify_len, most)
        return draft.tokens[:, : verify_len.max().item()], verify_len

    def _release(self, slot: int, outcome: Outcome) -> Outcome:
        self._sequences[slot] = None
        self._cache.clear(slot)
        self._context.clear(slot)
        return outcome

    def _finished(self, sequence: Sequence) -> Completion:
        spoken = self._decode(sequence.spoken_ids()) if self._pair.tokenizer else ""
        return sequence.completion(spoken)

    def _decode(self, token_ids: ListLike[int]) -> str:
        try:
            return self._pair.tokenizer.decode(token_ids)
        except FAULTS as error:
            raise _Undecodable(f"{type(error).__name__}: {error}") from error

    def _stop_strings(self, request: Request) -> StopStrings | None:
        """Make what looks for the request's stop strings; None: it has none."""
        stops, tokenizer = request.sampling.stop, self._pair.tokenizer
        if not stops:
            return None
        if tokenizer is None:
            raise UsageError(
                f"{request.item.where}: stop strings {list(stops)} need a tokenizer, and the "
                "target has none. Give token ids, or a target with a tokenizer."
            )
        return StopStrings(stops, self._decode)


class _Undecodable(Exception):
    """The tokenizer has no text for the ids of an answer."""


def _not_finite(sequence: Sequence) -> Failure:
    return _failure(
        sequence,
        f"the target's logits are not finite near answer token {len(sequence.token_ids)}. "
        "The weights or the number type are at fault: try --dtype float32.",
    )


def _failure(sequence: Sequence, problem: str) -> Failure:
    item = sequence.request.item
    return Failure(item, "engine", f"{item.where}: {problem}")


def _draft_length(pair: Pair, asked: int | None) -> int:
    block_size = pair.drafter.block_size
    if asked is not None and asked > block_size:
        raise UsageError(
            f"--draft-length {asked}: the drafter's block has {block_size} positions. "
            f"Use 0 to {block_size}, or leave it out."
        )
    return block_size if asked is None else asked


def _refuse_confidence(threshold: float, is_logged: bool) -> None:
    """Refuse what needs a confidence head."""
    option = "--log-confidence" if is_logged else f"--confidence-threshold {threshold}"
    if is_logged or threshold > 0:
        raise UsageError(f"{option}: this drafter has no confidence head. Leave the option out.")


def _temperatures(pair: Pair, draft_length: int) -> mx.array:
    """Give what confidences are divided by, [K]; 1 where nobody calibrated them."""
    known = pair.config.confidence_temperatures or ()
    return mx.array([*known, *[1.0] * draft_length][:draft_length])


def _known_rule(sampling: SamplingRule) -> SamplingRule:
    if sampling not in RULES:
        raise UsageError(f"--sampling {sampling}: unknown. Use {' or '.join(RULES)}.")
    return sampling
