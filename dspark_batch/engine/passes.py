"""A pair's passes, each one compiled into a single function where that pays."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

from dspark_batch import device
from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.drafters.drafter import Drafter
from dspark_batch.models.joined_layers import write_in_place
from dspark_batch.models.target import Target
from dspark_batch.numerics.acceptance import accept_with_bonus
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.numerics.rules import Greedy, Rule
from dspark_batch.numerics.sampling import are_finite

Arrays: TypeAlias = tuple[Any, ...]  # arrays; None where there is none
OverCache: TypeAlias = Callable[..., Arrays]  # of a cache, which it writes, and of arrays
MakeCache: TypeAlias = Callable[[int, int], SlotCache]  # for slots and positions


class Proposed(NamedTuple):
    """Drafts for all slots."""

    tokens: mx.array  # [S, K] int32
    is_sane: mx.array  # [S] bool: were they chosen from numbers?
    confidence: mx.array | None  # [S, K] float32 logits; None: nobody estimates it


class Verified(NamedTuple):
    """What the target says to drafts."""

    accepted: mx.array  # [S] int32
    bonus: mx.array  # [S] int32
    finite: mx.array  # [S, 1 + K] bool: are the logits of a position numbers?
    features: mx.array | None  # [S, W, m*E], tapped; None without taps


class Passes:
    """A pair's passes over ragged caches.

    On a GPU each one is compiled with the buffers as arguments and results: one graph instead of
    some thousand launches that the host prepares anew. On a CPU compilation takes 10 seconds and
    gains nothing. Bits may differ between the two, so a device has one way. A rule with noise has
    other noise each round, so what it decides stays outside.

    Args:
        target: whose products run over safe rows.
        drafter: whose products run as they come, since a draft decides nothing; unless:
        drafts_decide: which tokens come out, as by the rejection rule.

    Attributes:
        make_cache: makes what the target remembers, for slots and positions.
        make_context: makes what the drafter remembers.
        vocab_size: of the target.
        write_in_place: whether a pass behind one in flight writes where that one reads.
    """

    def __init__(self, target: Target, drafter: Drafter, *, drafts_decide: bool = False) -> None:
        self._drafter = drafter
        self.vocab_size = target.facts.vocab_size
        drafts_in_place = write_in_place(getattr(drafter, "layers", ()))
        self.write_in_place = target.writes_in_place and drafts_in_place
        self._for_drafter = nullcontext if drafts_decide else as_they_come
        self.make_cache, self.make_context = target.make_cache, drafter.make_cache
        made = _at_once if device.is_cpu() else _compiled
        self._logits = made(partial(_run, target), self.make_cache)
        self._logits_at = made(partial(_run, target), self.make_cache)
        self._choices = made(partial(_choose, target), self.make_cache)
        self._extend = made(partial(_extend, drafter), self.make_context)
        self._keep = SlotCache.keep if device.is_cpu() else _compiled_keep(self.make_cache)
        self._greedy: dict[int, OverCache] = {}  # number of drafts -> drafting

    def propose(
        self, context: SlotCache, anchors: mx.array, num_drafts: int, rule: Rule
    ) -> Proposed:
        """Draft from the anchors [S]; see `Drafter.propose`."""
        with self._for_drafter():
            draft = partial(_propose, self._drafter, num_drafts, rule)
            if device.is_cpu():
                with device.computing_at_once():
                    return Proposed(*draft(context, anchors))
            if not isinstance(rule, Greedy):
                return Proposed(*draft(context, anchors))
            if num_drafts not in self._greedy:
                self._greedy[num_drafts] = _compiled(draft, self.make_context)
            return Proposed(*self._greedy[num_drafts](context, anchors))

    def verify(
        self,
        cache: SlotCache,
        tokens: mx.array,
        verify_len: mx.array,
        num_drafts: int,
        rule: Rule,
        counts: Sequence[int] | None = None,
    ) -> Verified:
        """Run anchors, drafts and padding [S, W] through the target, and accept by the rule.

        Args:
            cache: of the slots.
            tokens: [S, W].
            verify_len: [S] int32, how many drafts of each slot count.
            num_drafts: of the W tokens.
            rule: decides.
            counts: see `run`; more than verify_len.
        """
        drafts = tokens[:, 1 : 1 + num_drafts]
        if not isinstance(rule, Greedy):
            logits, features = self.run(cache, tokens, counts)
            logits = logits[:, : 1 + num_drafts]
            decided = rule.verify(drafts, verify_len, logits)
            return Verified(*decided, are_finite(logits), features)
        choice, finite, features = _over_some(self._choices, cache, tokens, counts)
        choice = choice[:, : 1 + num_drafts]
        decided = accept_with_bonus(drafts, choice, verify_len)
        return Verified(*decided, finite[:, : 1 + num_drafts], features)

    def run(
        self, cache: SlotCache, tokens: mx.array, counts: Sequence[int] | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """Run tokens [S, W] through the target; logits [S, W, V], features [S, W, m*E] or None.

        Args:
            cache: of the slots.
            tokens: [S, W].
            counts: of slot s only the first counts[s] tokens run, 1 to W, and only what is said of
                them means anything; None: all.
        """
        logits, features = _over_some(self._logits, cache, tokens, counts)
        return logits, features

    def run_to(
        self, cache: SlotCache, tokens: mx.array, at: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        """Run tokens as `run` does, but for logits [S, P, V] at some tokens, at [S, P]."""
        logits, features = self._logits_at(cache, tokens, at)
        return logits, features

    def keep(self, cache: SlotCache, counts: mx.array) -> None:
        """Let the first counts[s] tokens of the target's last pass have happened in slot s."""
        self._keep(cache, counts)

    def extend(self, context: SlotCache, features: mx.array | None) -> None:
        """Write features behind the drafter's context; see `Drafter.extend`."""
        if features is not None and self._drafter.tap_ids:
            with self._for_drafter():
                self._extend(context, features)


def _choose(target: Target, cache: SlotCache, tokens: mx.array) -> Arrays:
    """Take the likeliest token of each position, as `Greedy` does."""
    logits, features = _run(target, cache, tokens)
    return Greedy().first(logits), are_finite(logits), features


def _run(target: Target, cache: SlotCache, tokens: mx.array, at: mx.array | None = None) -> Arrays:
    return target(tokens, cache, at)


def _over_some(
    over: OverCache, cache: SlotCache, tokens: mx.array, counts: Sequence[int] | None
) -> Arrays:
    """Run a pass over the first counts[s] tokens of each slot, packed; None: over all."""
    if counts is None:
        return over(cache, tokens)
    with cache.packed(counts, tokens.shape[1]) as packing:
        results = over(cache, packing.packed(tokens)[:, None])
    return tuple(None if each is None else packing.unpacked(each[:, 0]) for each in results)


def _propose(
    drafter: Drafter, num_drafts: int, rule: Rule, context: SlotCache, anchors: mx.array
) -> Arrays:
    draft = drafter.propose(anchors, context, num_drafts, rule.draft)
    if draft.highest is None:
        return draft.tokens, mx.ones(anchors.shape, dtype=mx.bool_), draft.confidence
    # A token that the drafter does not know has a logit of -inf; inf and NaN are faults.
    return draft.tokens, draft.highest < mx.inf, draft.confidence


def _extend(drafter: Drafter, context: SlotCache, features: mx.array) -> Arrays:
    drafter.extend(context, features)
    return ()


def _at_once(over: OverCache, make: MakeCache) -> OverCache:
    """Let a CPU compute a pass while the host says the rest of it."""

    def begun(cache: SlotCache, *given: mx.array) -> Arrays:
        with device.computing_at_once():
            return over(cache, *given)

    return begun


def _compiled(over: OverCache, make: MakeCache) -> OverCache:
    """Compile a pass; what the cache holds goes in, and what the step leaves of it comes out."""
    present: list[bool] = []  # which results there are; told when the pass is traced

    def pure(
        given: list[mx.array],
        lengths: mx.array,
        expected: mx.array | None,
        held: list[list[mx.array]],
        capacity: int,
    ) -> tuple[list[mx.array], list[list[mx.array]]]:
        cache = make(lengths.shape[0], capacity)
        cache.hold(lengths, expected, held)
        results = over(cache, *given)
        present[:] = [result is not None for result in results]
        return [result for result in results if result is not None], cache.left()

    run = mx.compile(pure)

    def compiled(cache: SlotCache, *given: mx.array) -> Arrays:
        known = cache.lengths, cache.expected, cache.held(), cache.capacity
        results, left = run(list(given), *known)
        cache.leave(left)  # nobody else holds the old buffers, so none is copied
        rest = iter(results)
        return tuple(next(rest) if is_there else None for is_there in present)

    return compiled


def _compiled_keep(make: MakeCache) -> Callable[[SlotCache, mx.array], None]:
    """Compile `SlotCache.keep` where it replays states: many small operations in each layer."""

    def pure(
        counts: mx.array,
        lengths: mx.array,
        expected: mx.array | None,
        held: list[list[mx.array]],
        left: list[list[mx.array]],
    ) -> tuple[mx.array, list[list[mx.array]]]:
        cache = make(lengths.shape[0], 0)
        cache.hold(lengths, expected, held)
        cache.leave(left)
        cache.keep(counts)
        return cache.lengths, cache.held()

    run = mx.compile(pure)

    def compiled(cache: SlotCache, counts: mx.array) -> None:
        if cache.bytes_per_slot == 0:  # no states, or none before this step
            cache.keep(counts)
            return
        known = cache.lengths, cache.expected, cache.held(), cache.left()
        lengths, held = run(counts, *known)
        cache.hold(lengths, None, held)

    return compiled
