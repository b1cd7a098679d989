"""The only loop: admit, round, commit."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx

from dspark_batch.engine.cache import RaggedCache
from dspark_batch.engine.prefill import prefill
from dspark_batch.engine.sampling import RULES, rule_of
from dspark_batch.engine.sequence import Sequence
from dspark_batch.engine.stopping import StopStrings
from dspark_batch.errors import UsageError
from dspark_batch.models.dspark import Draft
from dspark_batch.models.load import Pair
from dspark_batch.models.plain import NoDrafter
from dspark_batch.numerics.confidence import threshold_lengths
from dspark_batch.types import Completion, Failure, Outcome, Request, SamplingRule


class _Step(NamedTuple):
    """What one round gave, by slot; the free slots' part means nothing."""

    drafts: list[list[int]]
    verify_len: list[int]  # drafts that the target verified
    accepted: list[int]
    bonus: list[int]
    finite: list[list[bool]]  # by verified position: are the logits numbers?
    confidence: list[list[float]]  # by draft; empty if it is not logged


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
        sequence.begin(first.item())
        if sequence.finish_reason is not None:
            yield self._finished(sequence)
            return
        slot = self._sequences.index(None)
        self._cache.insert(slot, filled.cache, sequence.cached_len)
        self._context.insert(slot, filled.context, sequence.cached_len)
        self._anchors[slot] = first
        self._sequences[slot] = sequence

    def _round(self) -> Iterator[Outcome]:
        """Draft, verify, accept and commit once for every active slot."""
        step = self._step()
        for slot, sequence in enumerate(self._sequences):
            if sequence is None:
                continue
            stay = step.drafts[slot][: step.accepted[slot]]
            confidence = step.confidence[slot] if self._log_confidence else None
            stayed = sequence.advance(stay, step.bonus[slot], step.verify_len[slot], confidence)
            if not all(step.finite[slot][:stayed]):
                yield self._release(slot, _not_finite(sequence))
            elif sequence.finish_reason is not None:
                yield self._release(slot, self._finished(sequence))

    def _step(self) -> "_Step":
        """Run drafter and target once over all slots and move the caches to the new anchors."""
        self._reserve()
        drafter, rule = self._pair.drafter, rule_of(self._sampling, self._sequences)
        draft = drafter.propose(self._anchors, self._context, self._draft_length, rule.draft)
        drafts, verify_len = self._choose_verified(draft)
        tokens = mx.concatenate([self._anchors[:, None], drafts], axis=1)
        logits, features = self._pair.target(tokens, self._cache.layers)
        accepted, bonus = rule.verify(drafts, verify_len, logits)
        finite = mx.isfinite(logits).all(axis=-1)

        drafter.extend(self._context, features)
        active = mx.array([s is not None for s in self._sequences])
        count = mx.where(active, accepted + 1, 0)
        self._cache.keep(count)
        self._context.keep(count)
        self._anchors = bonus
        confidence = draft.confidence if self._log_confidence else drafts[:, :0]
        results = (drafts, verify_len, accepted, bonus, finite, confidence)
        mx.eval(*results, self._cache.arrays(), self._context.arrays())
        return _Step(*(array.tolist() for array in results))

    def _reserve(self) -> None:
        """Make room for the anchor and the block of the slot that is furthest."""
        longest = max(s.cached_len for s in self._sequences if s is not None)
        self._cache.reserve(longest + 1 + self._draft_length)
        self._context.reserve(longest + 1 + self._pair.drafter.block_size)

    def _choose_verified(self, draft: Draft) -> tuple[mx.array, mx.array]:
        """Return the drafts to send to the target, [S, l], and how many count per slot, [S]."""
        if self._threshold <= 0 or draft.confidence is None:
            return draft.tokens, mx.full(draft.tokens.shape[0], draft.tokens.shape[1])
        verify_len = threshold_lengths(draft.confidence / self._temperatures, self._threshold)
        return draft.tokens[:, : verify_len.max().item()], verify_len

    def _release(self, slot: int, outcome: Outcome) -> Outcome:
        self._sequences[slot] = None
        self._cache.clear(slot)
        self._context.clear(slot)
        return outcome

    def _finished(self, sequence: Sequence) -> Completion:
        tokenizer = self._pair.tokenizer
        return sequence.completion(tokenizer.decode(sequence.spoken_ids()) if tokenizer else "")

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
        return StopStrings(stops, tokenizer.decode)


def _not_finite(sequence: Sequence) -> Failure:
    item, position = sequence.request.item, len(sequence.token_ids)
    return Failure(
        item,
        "engine",
        f"{item.where}: the target's logits are not finite near answer token {position}. "
        "The weights or the number type are at fault: try --dtype float32.",
    )


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
