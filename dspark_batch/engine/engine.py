"""The only loop: commit, admit, round.

    commit   what stayed of the round that the device had, into the sequences; a slot whose answer
             ended is free again
    admit    the window's next requests into free slots, their prompts through the target
    round    draft, verify, accept for all slots: one drafter pass, one target pass

`Engine.step` does this once, and leaves the round to the device: while it runs, the host decodes
the answers that ended in the round before, and whoever called hands them over, and reads, renders
and tokenises the next prompts. On a GPU the next round follows at once where nothing stops it: all
that it needs of the one before is on the device. Who ended is noticed a round late then. Else the
next drafts follow, and are made anew if others sit in the slots then.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ListLike
from contextlib import suppress
from typing import Any, NamedTuple

import mlx.core as mx

from dspark_batch import device
from dspark_batch.answers.sampling import RULES, rule_of, scores_of, steers
from dspark_batch.answers.sequence import Score, Sequence
from dspark_batch.answers.steering import guide_of, wish_of
from dspark_batch.answers.stopping import StopStrings
from dspark_batch.answers.who_drafts import LookUps
from dspark_batch.caches.prefix_cache import PrefixCache
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.clock import Clock
from dspark_batch.engine.fallback import (
    FAULTS,
    NOT_FINITE,
    DrafterFault,
    guarded,
)
from dspark_batch.engine.passes import Passes, Proposed
from dspark_batch.engine.scheduler import MayBegin, Scheduler, Waiting
from dspark_batch.engine.shapes import Shapes
from dspark_batch.engine.slots import Slots
from dspark_batch.errors import UsageError
from dspark_batch.numerics.confidence import threshold_lengths
from dspark_batch.numerics.rules import Rule, Scored
from dspark_batch.numerics.scores import Scores
from dspark_batch.pair import Pair
from dspark_batch.tuning.pace import Acceptance, Costs, Kind, Pace, Step, Weights
from dspark_batch.types import (
    Failure,
    Gauge,
    Item,
    Outcome,
    Partial,
    Request,
    SamplingRule,
)

_ANY_SHAPE = Shapes()
_PREFIX_POSITIONS = 1 << 14
_LONGEST_JUMP = 8  # tokens that grammars force in a round without a drafter
_LEAST_ROUNDS = 32  # of an answer, on average, beside which one more, for nothing, costs little


def _always(item: Item) -> bool:
    """Let every item begin."""
    return True


class _Round(NamedTuple):
    """What one round gives, by slot; what free slots get means nothing."""

    drafts: mx.array  # [S, K]
    verify_len: mx.array  # [S], drafts that the target verified
    accepted: mx.array  # [S]
    bonus: mx.array  # [S]
    finite: mx.array  # [S, 1 + l], by verified position: are the logits numbers?
    confidence: mx.array  # [S, K], or [S, 0] if it is not logged
    is_sane: mx.array  # [S], were the drafts chosen from numbers?
    scores: Scores | None  # [S, 1 + l], of the accepted drafts and the bonus; None: nobody asked


class _Drafted(NamedTuple):
    """Drafts for all slots as they sat at some time."""

    proposed: Proposed
    rule: Rule
    draft_length: int
    changes: int  # of the slots, until then


class _Sent(NamedTuple):
    """A round that the device has, or had."""

    round: _Round
    kind: Kind
    sequences: list[Sequence | None]  # as they sat
    most_kept: int  # tokens of a slot


class _Step(NamedTuple):
    """A round on the host; the fields of `_Round`."""

    drafts: list[list[int]]
    verify_len: list[int]
    accepted: list[int]
    bonus: list[int]
    finite: list[list[bool]]
    confidence: list[list[float]]
    is_sane: list[bool]
    scores: list[list[Score]]


class Engine:
    """Answers requests with a resident pair; owns the slots, their caches and the prefix cache.

    `generate` answers a stream. Who gets requests one by one adds them, and steps:

        engine.add(request)
        while not engine.is_idle:
            for outcome in engine.step(): ...

    All calls come from one thread.

    Args:
        pair: target, tokenizer and drafter.
        slots: most sequences that decode together.
        draft_length: drafts per round; None for the drafter's block, 0 for plain decoding.
        confidence_threshold: a block is verified up to its first draft below this; 0 for all.
        sampling: how requests with a temperature are drawn; both ways are exact.
        log_confidence: completions tell the confidence of every verified draft.
        lookup: drafts come out of a slot's own prompt and answer where these promise more than the
            drafter does. The rejection rule never does so: there drafts decide which tokens come
            out.
        shapes: the passes that may run.
        lengths: draft lengths to choose from, ascending from 0; with them, and without a draft
            length, each round drafts what pays. The rejection rule always drafts whole blocks,
            since there the drafts decide which tokens come out.
        costs: what the parts of a round cost, as known before.
        most_positions: that all slots together may need in the cache; None for any number. A
            request that alone needs more runs alone.
        prefix_positions: most that the prefix cache keeps; 0 for none.
        state_positions: what a slot remembers beside its positions, in positions of the same size.
        drafts_ahead: whether the device gets the next drafts to make before the host has read a
            round; None: if it is a GPU.
        rounds_ahead: whether it gets the next round, too; None: if that copies no cache.

    Raises:
        UsageError: draft_length is more than the drafter's block, there is no confidence head, or
            nobody knows this sampling.
    """

    def __init__(  # noqa: PLR0913  settings, each with a default
        self,
        pair: Pair,
        *,
        slots: int = 1,
        draft_length: int | None = None,
        confidence_threshold: float = 0.0,
        sampling: SamplingRule = "coupled",
        log_confidence: bool = False,
        lookup: bool = False,
        shapes: Shapes = _ANY_SHAPE,
        lengths: ListLike[int] = (),
        costs: Weights = (1.0, 0.0, 0.0, 0.0),
        most_positions: int | None = None,
        prefix_positions: int = _PREFIX_POSITIONS,
        state_positions: int = 0,
        drafts_ahead: bool | None = None,
        rounds_ahead: bool | None = None,
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
        self._shapes, self._num_slots = shapes, slots
        decide = sampling == "rejection"
        self._passes = Passes(pair.target, pair.drafter, drafts_decide=decide)
        self._acceptance = Acceptance(slots)
        self.costs = Costs(costs, _upkeep(pair))
        self._step = Step(self._draft_length)
        self._pace: Pace | None = None  # None: the draft length is fixed
        if lengths and draft_length is None and sampling != "rejection":
            self._pace = Pace(self.costs, self._acceptance, lengths, slots)
            self._step = self._pace.step
        self._look_ups = LookUps(
            pair.drafter,
            slots,
            self.costs,
            jumps=shapes.jumps(0 if decide or log_confidence else _longest_jump(draft_length)),
            is_on=lookup and not decide,
        )
        self._slots = Slots(pair, shapes, 1 + self._step.draft_length, state_positions)
        self._ended: list[Sequence | Failure] = []  # to be handed over
        self._running: deque[_Sent] = deque()  # the device has them
        # A CPU is the host itself.
        self._drafts_ahead = not device.is_cpu() if drafts_ahead is None else drafts_ahead
        self._rounds_ahead = self._passes.write_in_place if rounds_ahead is None else rounds_ahead
        self._next: _Drafted | None = None  # drafts made ahead
        self._texts: dict[int, str] = {}  # of single tokens
        self._clock = Clock()
        self._scheduler = Scheduler(
            self._passes,
            shapes,
            self._slots,
            most_slots=slots,
            most_positions=most_positions,
            prefixes=PrefixCache(prefix_positions, state_positions),
            sampling=self._sampling,
            sequence=self._sequence,
            begin=self._begin,
            clock=self._clock,
            step=lambda: self._step,
            sits_behind=lambda some: self._rounds_ahead and self._slots.has_seats(some),
            commit_all=self._commit_all,
        )

    def generate(
        self, stream: Iterable[Request | Failure | None], may_begin: MayBegin = _always
    ) -> Iterator[Outcome]:
        """Answer a stream of requests, in the order in which answers finish.

        Pulls a few requests ahead; failures pass through. A None means that there is nothing right
        now: the stream is asked again after a round, or this ends if nothing is left to do.

        Args:
            stream: of requests.
            may_begin: asked about each item right before it is generated; after a no, what is in
                flight is finished and nothing more is begun.
        """
        pending, may_go_on = iter(stream), True

        def begins(item: Item) -> bool:
            nonlocal may_go_on
            may_go_on = may_begin(item)
            return may_go_on

        while True:
            yield from self._pull(pending)
            yield from self.step(begins)  # and the device runs a round
            if not may_go_on:
                pending = iter(())
            if self.is_idle:
                return

    def add(self, request: Request, *, urgent: bool = False) -> None:
        """Let a request wait for a slot, without a limit; `step` answers it.

        Args:
            request: whose item is none of those that have not ended.
            urgent: whether it goes before all that are not. Nobody gives up a slot for it.

        Raises:
            UsageError: it has stop strings, bad words or a grammar, and there is no tokenizer.
        """
        self._stop_strings(request)
        if problem := self._cannot_steer(request):
            self._ended.append(_failure_of(request.item, problem))
            return
        self._scheduler.window.add(request, is_urgent=urgent)

    def step(self, may_begin: MayBegin = _always) -> list[Outcome]:
        """Commit a round that the device has, and send it the next one; return what ended.

        Waits for no round that it sends. Without requests it does nothing.

        Args:
            may_begin: asked about each item right before it is generated; after a no, requests
                that wait are dropped without an outcome.
        """
        if self._running:
            self._commit_one()
        else:
            self._clock.begin()
        if not self._slots.active:
            self._commit_all()
        self._scheduler.run(may_begin)
        if self._slots.is_too_large:
            self._commit_all()
            self._slots.shrink()
        if not self._slots.active:
            self._clock.wait()
        elif not self._running:
            self._launch()
        if self._running:
            self._go_ahead()
        return self._hand_over()

    def cancel(self, item: Item) -> None:
        """Give up an item, wherever it is; one that has ended, or never came, is no mistake.

        It comes out of the next step as a failure "cancelled", and its slot is free in the round
        that this step sends. Nothing changes for others.
        """
        requests = self._scheduler.cancel(item) + self._slots.cancel(item)
        self._ended += [_cancelled(request.item) for request in requests]

    def so_far(self, item: Item) -> Partial | None:
        """Tell what is committed of an answer that decodes; None: nothing, or it has ended."""
        there = [s for s in self._slots.active if s.request.item.is_same(item)]
        begun = [s for s in there + self._scheduler.find(item) if s.token_ids]
        try:
            return begun[0].partial(self._text_of) if begun else None
        except _Undecodable:  # its end will say so
            return None

    @property
    def is_idle(self) -> bool:
        """Whether all that was added has come out."""
        waits = self._running or self._slots.active or self._ended or self._scheduler.window
        return not waits and self._scheduler.is_idle

    def gauge(self) -> Gauge:
        """Tell how full it is, and what it has spent."""
        clock = self._clock
        return Gauge(
            busy_slots=clock.slot_rounds / max(1, clock.rounds),
            slots=self._num_slots,
            memory_bytes=mx.get_active_memory(),
            peak_memory_bytes=mx.get_peak_memory(),
            prefill_s=clock.prefill_s,
            round_s=clock.round_s,
            idle_s=clock.idle_s,
            sampled_rounds=clock.sampled_rounds,
            sampled_draft_s=clock.draft_s,
            sampled_verify_s=clock.verify_s,
            prompt_tokens=clock.prompt_tokens,
        )

    def leave_out(self, seconds: float) -> None:
        """Count as ours no time in which who took the last answer had the device."""
        self._clock.leave_out(seconds)

    def _pull(self, stream: Iterator[Request | Failure | None]) -> Iterator[Failure]:
        """Add until enough wait, or the stream ends or pauses; failures pass through."""
        while self._scheduler.window.has_room:
            pulled = next(stream, None)
            if pulled is None:
                return
            if isinstance(pulled, Failure):
                yield pulled
            else:
                self.add(pulled)

    def _sequence(self, waiting: Waiting) -> Sequence:
        request, stop_ids = waiting.request, self._pair.config.stop_ids
        strings, wish = self._stop_strings(request), wish_of(self._pair, request)
        return Sequence(request, stop_ids, strings, wish=wish, is_urgent=waiting.is_urgent)

    def _begin(
        self, sequence: Sequence, token: int, is_finite: bool, scores: ListLike[Score]
    ) -> bool:
        """Commit a first token; return whether more are to come."""
        try:
            sequence.begin(token, scores)
            is_sound = is_finite and sequence.is_told_numbers
            failure = None if is_sound else _not_finite(sequence)
        except _Undecodable as error:
            failure = _undecodable(sequence, error)
        return self._goes_on(sequence, failure)

    def _goes_on(self, sequence: Sequence, failure: Failure | None) -> bool:
        """Say whether an answer goes on; one that ended is handed over next."""
        if failure is None and (problem := sequence.cannot_go_on):
            what = f"the structure of the answer cannot be followed any further: {problem}."
            failure = _failure(sequence, what)
        if failure is None and sequence.finish_reason is None:
            return True
        self._ended.append(failure or sequence)
        return False

    def _go_ahead(self) -> None:
        """Send the next round, or its drafts, behind one that nobody has read."""
        if len(self._running) == 1 and self._may_go_ahead():
            self._launch()
        elif len(self._running) == 1:
            self._draft_ahead()

    def _may_go_ahead(self) -> bool:
        """Whether a round can be sent before the one that the device has is read."""
        if not self._rounds_ahead or self._clock.splits or self._look_ups.is_on:
            return False
        if self._threshold > 0 or steers(self._slots.sequences):
            return False  # the host has to see what came
        is_dear = self._clock.slot_rounds < _LEAST_ROUNDS * self._clock.answers
        if is_dear and self._scheduler.num_waiting:
            return False
        goes_on = any(sequence.num_left > 1 for sequence in self._slots.active)
        most_kept = self._running[0].most_kept
        return goes_on and self._slots.has_room(self._step.draft_length, most_kept)

    def _launch(self) -> None:
        """Send one round over all slots to the device, and move the caches to the new anchors."""
        slots = self._slots
        self._look_ups.find(slots.sequences, self._step)
        unread = sum(sent.most_kept for sent in self._running)
        slots.fit(self._look_ups.kind.draft_length, unread)
        drafted = self._drafted()
        proposed, rule = drafted.proposed, drafted.rule
        drafts, verify_len, most = self._look_ups.over(*self._choose_verified(proposed))
        if any(self._look_ups.found) and drafted.draft_length and steers(slots.sequences):
            # It remembers other drafts.
            rule = rule_of(self._sampling, slots.sequences, slots.positions)
        anchors, num_drafts = slots.anchors, drafts.shape[1]
        padding = mx.zeros((anchors.shape[0], slots.width(num_drafts) - 1 - num_drafts), mx.int32)
        tokens = mx.concatenate([anchors[:, None], drafts, padding], axis=1)
        slots.expect(num_drafts)
        counts = slots.packed_counts(most, tokens.shape[1])
        verified = self._passes.verify(slots.cache, tokens, verify_len, num_drafts, rule, counts)
        self._clock.verified(*verified)
        self._extend(verified.features)
        self._clock.drafted(*slots.context.arrays())
        slots.keep(self._passes, verified.accepted, verified.bonus)
        confidence = proposed.confidence if self._log_confidence else None
        if confidence is None:  # or nothing was drafted
            confidence = drafts[:, :0]
        scores = rule.scores if isinstance(rule, Scored) else None
        launched = _Round(drafts, verify_len, *verified[:3], confidence, proposed.is_sane, scores)
        self._clock.launch(len(slots.active))
        mx.async_eval(launched, slots.cache.arrays())
        mx.async_eval(slots.context.arrays())
        sent = _Sent(launched, self._look_ups.kind, [*slots.sequences], 1 + num_drafts)
        self._running.append(sent)

    def _drafted(self) -> _Drafted:
        """Take the drafts that were made ahead, if they fit; else draft."""
        ahead, self._next = self._next, None
        now = self._step.draft_length, self._slots.changes
        is_current = ahead is not None and (ahead.draft_length, ahead.changes) == now
        return ahead if ahead is not None and is_current else self._draft_now()

    def _draft(self) -> _Drafted:
        """Send the drafter's pass over all slots to the device; see `_propose`."""
        slots = self._slots
        rule = rule_of(self._sampling, slots.sequences, slots.positions)
        self._clock.begin_parts(slots.anchors, *slots.context.arrays())
        proposed = self._propose(rule)
        if proposed.tokens.size:  # the drafter runs while the host prepares the target's pass
            mx.async_eval(proposed.tokens)
            self._clock.send_drafts()
        self._clock.drafted(proposed.tokens, proposed.is_sane)
        return _Drafted(proposed, rule, proposed.tokens.shape[1], slots.changes)

    def _draft_now(self) -> _Drafted:
        """Draft; a fault makes what is in flight go on plainly."""
        try:
            return self._draft()
        except DrafterFault as fault:
            self._fall_back(fault)
            return self._draft()

    def _draft_ahead(self) -> None:
        """Send the next drafts behind a round that nobody has read."""
        is_known = not steers(self._slots.sequences)  # else who steers counts what is not read yet
        drafts = self._drafts_ahead and self._step.draft_length > 0
        if drafts and is_known and not self._clock.splits:
            self._slots.fit_next()
            with suppress(DrafterFault):  # met again where it counts, if it stays
                self._next = self._draft()

    def _commit_all(self) -> None:
        """Commit all rounds that the device has."""
        while self._running:
            self._commit_one()

    def _commit_one(self) -> None:
        """Commit the oldest round that the device has."""
        sent = self._running.popleft()
        self._commit(self._wait(sent), sent)

    def _wait(self, sent: _Sent) -> _Step:
        """Wait for a round."""
        self._clock.ask()
        mx.eval(sent.round)
        self._learn_cost(sent, self._clock.end())
        *arrays, scores = sent.round
        fields: list[Any] = [*(array.tolist() for array in arrays), scores_of(scores)]
        return _Step(*fields)

    def _commit(self, step: _Step, sent: _Sent) -> None:
        """Commit a round to all who still sit; free the slots of those that ended."""
        ended: list[int] = []
        for slot, sequence in enumerate(sent.sequences):
            if sequence is None or self._slots.sequences[slot] is not sequence:
                continue  # it ended in a round before, or was given up
            try:
                is_finite = self._advance(step, slot, sequence)
                failure = None if is_finite else _not_finite(sequence)
            except _Undecodable as error:
                failure = _undecodable(sequence, error)
            if not self._goes_on(sequence, failure):
                ended.append(slot)
            else:
                self._learn_acceptance(step, slot, sequence)
        self._slots.release(ended)
        self._clock.end_answers(len(ended))
        self._choose_step()

    def _learn_acceptance(self, step: _Step, slot: int, sequence: Sequence) -> None:
        """Learn what drafts are worth to the pace, and the drafter's to look-ups."""
        accepted, verified = step.accepted[slot], step.verify_len[slot]
        if self._look_ups.is_on:
            self._look_ups.learn(slot, accepted, verified)
            # Who has no drafts waits for those of the others: of all, none was right.
            verified = len(step.drafts[slot])
        is_served = sequence.is_served or self._look_ups.found[slot]
        if self._pace is not None and is_served and not self._look_ups.kind.is_jump:
            self._acceptance.add(accepted, verified)

    def _learn_cost(self, sent: _Sent, seconds: float | None) -> None:
        """Learn what such a round takes; None: it says nothing about others."""
        if seconds is not None and sent.round.drafts.shape[1] == sent.kind.draft_length:
            self.costs.add(sent.kind, seconds)

    def _choose_step(self) -> None:
        """Choose the next round's draft length by what drafts were worth so far."""
        active = self._slots.active
        if self._pace is not None and active:
            served = sum(sequence.is_served for sequence in active)
            self._step = self._pace.next(len(self._slots.sequences), served)

    def _advance(self, step: _Step, slot: int, sequence: Sequence) -> bool:
        """Commit a round to one slot; return whether what it committed came from numbers."""
        if not step.is_sane[slot]:
            sequence.fallback = sequence.fallback or NOT_FINITE
        stay = step.drafts[slot][: step.accepted[slot]]
        confidence = step.confidence[slot] if self._log_confidence else None
        scores = step.scores[slot] if step.scores else ()
        drafted = step.verify_len[slot]
        stayed = sequence.advance(stay, step.bonus[slot], drafted, confidence, scores)
        if slot in self._look_ups.looked_up:
            sequence.count_look_up(drafted, min(stayed, len(stay)))
        return all(step.finite[slot][:stayed])

    def _hand_over(self) -> list[Outcome]:
        """Decode the answers that ended."""
        ended, self._ended = self._ended, []
        return [each if isinstance(each, Failure) else self._finished(each) for each in ended]

    def _propose(self, rule: Rule) -> Proposed:
        """Draft for all slots; nothing, where nobody is left whom the drafter serves, or needs it.

        Raises:
            DrafterFault: it failed.
        """
        anchors, context = self._slots.anchors, self._slots.context
        num_drafts = self._step.draft_length
        slots = zip(self._slots.sequences, self._look_ups.found, strict=True)
        if num_drafts > 0 and any(s and s.is_served and not found for s, found in slots):
            return guarded(lambda: self._passes.propose(context, anchors, num_drafts, rule))
        nothing = mx.zeros((anchors.shape[0], 0), dtype=mx.int32)
        return Proposed(nothing, mx.ones(anchors.shape[0], dtype=mx.bool_), None)

    def _extend(self, features: mx.array | None) -> None:
        """Take the round's features into the drafter's context, unless it rests."""
        if features is None:
            return  # nobody reads them, so there is no context to lose
        if not self._step.keeps_context:
            for sequence in self._slots.active:
                sequence.has_context = False
            return
        try:
            guarded(lambda: self._passes.extend(self._slots.context, features))
        except DrafterFault as fault:
            self._fall_back(fault)

    def _fall_back(self, fault: DrafterFault) -> None:
        """Decode what is in flight plainly from here on; a pass is one for all slots."""
        for sequence in self._slots.active:
            sequence.fallback = sequence.fallback or str(fault)

    def _choose_verified(self, proposed: Proposed) -> tuple[mx.array, mx.array, ListLike[int]]:
        """Return the drafts to send to the target, [S, l], and how many count per slot, [S].

        Also the most that may count, as far as the host knows: nobody waits to learn more.
        """
        drafts, confidence = proposed.tokens, proposed.confidence
        served = [s is not None and s.is_served for s in self._slots.sequences]
        most = [drafts.shape[1] if is_served else 0 for is_served in served]
        verify_len = mx.where(proposed.is_sane, mx.array(most, dtype=mx.int32), 0)
        if self._threshold <= 0 or confidence is None:
            return drafts, verify_len, most
        temperatures = self._temperatures[: drafts.shape[1]]
        confident = threshold_lengths(confidence / temperatures, self._threshold)
        verify_len = mx.minimum(confident, verify_len)
        known: Any = verify_len.tolist()
        return drafts[:, : max(known)], verify_len, known

    def _finished(self, sequence: Sequence) -> Outcome:
        given = sequence.request.given
        try:
            text = self._spoken(sequence) if given is None else given.text
            logprobs = sequence.logprobs(self._text_of)
            prompt_logprobs = sequence.prompt_logprobs(self._text_of)
        except _Undecodable as error:
            return _undecodable(sequence, error)
        return sequence.completion(text, logprobs, prompt_logprobs)

    def _spoken(self, sequence: Sequence) -> str:
        return self._decode(sequence.spoken_ids()) if self._pair.tokenizer else ""

    def _text_of(self, token: int) -> str:
        """Decode one token; "" without a tokenizer."""
        if token not in self._texts:
            self._texts[token] = self._decode([token]) if self._pair.tokenizer else ""
        return self._texts[token]

    def _decode(self, token_ids: ListLike[int]) -> str:
        try:
            return self._pair.reader.decode(token_ids)
        except FAULTS as error:
            raise _Undecodable(f"{type(error).__name__}: {error}") from error

    def _stop_strings(self, request: Request) -> StopStrings | None:
        """Make what looks for the request's stop strings; None: it has none."""
        sampling = request.sampling
        if sampling.stop or sampling.bad_words or sampling.structure:
            self._need_tokenizer(request)
        if not sampling.stop:
            return None
        return StopStrings(sampling.stop, self._decode, sampling.min_tokens)

    def _need_tokenizer(self, request: Request) -> None:
        if self._pair.tokenizer is None:
            sampling = request.sampling
            what = f"bad words {list(sampling.bad_words)}"
            if sampling.stop or sampling.structure:
                what = f"stop strings {list(sampling.stop)}" if sampling.stop else "grammars"
            raise UsageError(
                f"{request.item.where}: {what} need a tokenizer, and the target has none. "
                "Give token ids, or a target with a tokenizer."
            )

    def _cannot_steer(self, request: Request) -> str | None:
        """Say why a request cannot be steered as it wants; None: it can."""
        if biased := [token for token, _ in request.sampling.logit_bias]:
            vocab_size = self._pair.target.facts.vocab_size
            if max(biased) >= vocab_size:
                return (
                    f"logit_bias names token {max(biased)}, and the vocabulary has {vocab_size}; "
                    f"name tokens from 0 to {vocab_size - 1}."
                )
        try:
            guide_of(self._pair, request)
        except ValueError as error:
            return f"the structure of the answer does not go with this target: {error}."
        return None


class _Undecodable(Exception):
    """The tokenizer has no text for the ids of an answer."""


def _undecodable(sequence: Sequence, error: _Undecodable) -> Failure:
    return _failure(sequence, f"the tokenizer cannot decode the answer ({error}).")


def _not_finite(sequence: Sequence) -> Failure:
    return _failure(
        sequence,
        f"the target's logits are not finite near answer token {len(sequence.token_ids)}. "
        "The weights or the number type are at fault: try --dtype float32.",
    )


def _failure(sequence: Sequence, problem: str) -> Failure:
    return _failure_of(sequence.request.item, problem)


def _failure_of(item: Item, problem: str) -> Failure:
    return Failure(item, "engine", f"{item.where}: {problem}")


def _cancelled(item: Item) -> Failure:
    return Failure(item, "cancelled", f"{item.where}: given up before its answer ended.")


def _draft_length(pair: Pair, asked: int | None) -> int:
    block_size = pair.drafter.block_size
    if asked is not None and asked > block_size:
        raise UsageError(
            f"--draft-length {asked}: the drafter's block has {block_size} positions. "
            f"Use 0 to {block_size}, or leave it out."
        )
    return block_size if asked is None else asked


def _upkeep(pair: Pair) -> float:
    """Say, by a rule, which share of a plain round goes into the drafter's context.

    A tapped layer, and two layers of the drafter, read as many weights as a twelfth of a layer of
    the target has.
    """
    drafter = pair.drafter
    read = len(drafter.tap_ids) + drafter.num_layers / 2
    return read / (read + 12 * pair.target.facts.num_layers)


def _longest_jump(asked: int | None) -> int:
    return _LONGEST_JUMP if asked is None else asked


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
