"""What the engine does next, from measured seconds and observed acceptance: policy, no arrays."""

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import ceil
from operator import attrgetter
from statistics import median
from typing import NamedTuple, Protocol

from dspark_batch.types import Json

_TIE = 0.01  # plans whose expected tokens/s differ by less are equally good
_CLOSE = 0.03  # a draft length that is better by less is not worth a change
_PLAIN_ROUNDS = 256  # rounds without drafts before they are tried again, or more:
_TRIAL_SHARE = 0.02  # of the time at most may be lost by trials
_TRIAL_ROUNDS = 4
_LEAST_SEEN, _MOST_SEEN = 3, 7  # rounds of a kind, whose median is what such a round takes
_STALE_ROUNDS = 512  # without one of a kind, until nothing is known of it
_HALF_LIFE = 256  # rounds of single slots until a round counts half
_HALF_LIFE_OF_EACH = 8  # with many slots, rounds of each


class TargetPass(NamedTuple):
    """A measured shape, one of the run's shape class."""

    slots: int  # padding included
    width: int
    seconds: float


class DrafterPass(NamedTuple):
    """A measured pass over whole blocks."""

    slots: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepCurve:
    """What a round costs on this machine.

    What was not measured is padded to a measured pass that covers it: the target to the cheapest,
    the drafter to the one with the fewest slots.

    Raises:
        ValueError: there is no target pass, or a pass takes no time.
    """

    target: tuple[TargetPass, ...]
    drafter: tuple[DrafterPass, ...] = ()  # none: nothing can be drafted
    host_s: float = 0.0  # of every round, while the device waits

    def __post_init__(self) -> None:
        if not self.target or not all(p.seconds > 0 for p in self.target + self.drafter):
            raise ValueError(f"{self}: expected target passes, and more than 0 seconds for each.")

    def __hash__(self) -> int:
        return hash((len(self.target), self.host_s))  # quick: passes are looked up every round

    def shape(self, slots: int, width: int) -> tuple[int, int]:
        """Return slots and width of the pass that verifies; ValueError if none covers them."""
        return self._verifier(slots, width)[:2]

    def verify_s(self, slots: int, width: int) -> float:
        """Return the seconds of the pass that verifies; ValueError if none covers it."""
        return self._verifier(slots, width).seconds

    def draft_s(self, slots: int) -> float:
        """Return the seconds of the pass that drafts; ValueError if none covers it."""
        found = _drafter_pass(self, slots)
        if found is None:
            raise ValueError(f"No measured drafter pass covers {slots} slots.")
        return found.seconds

    def covers(self, slots: int, draft_length: int) -> bool:
        """Tell whether passes for such a round were measured."""
        can_draft = draft_length == 0 or _drafter_pass(self, slots) is not None
        return can_draft and _target_pass(self, slots, 1 + draft_length) is not None

    def tokens_per_s(self, survival: ListLike[float], slots: int, draft_length: int) -> float:
        """Expect the tokens per second of all slots; without drafts no drafter runs."""
        expected = slots * accept_length(survival, 1 + draft_length)
        return expected / self.round_s(slots, draft_length)

    def round_s(self, slots: int, draft_length: int) -> float:
        """Return the seconds of a round; ValueError if no measured passes cover it."""
        draft_s = self.draft_s(slots) if draft_length > 0 else 0.0
        return draft_s + self.verify_s(slots, 1 + draft_length) + self.host_s

    def to_json(self) -> dict[str, Json]:
        """Return what `from_json` reads back."""
        target, drafter = (list(map(list, passes)) for passes in (self.target, self.drafter))
        return {"target": target, "drafter": drafter, "host_s": self.host_s}

    @classmethod
    def from_json(cls, curve: Mapping[str, Json]) -> "StepCurve":
        """Read what `to_json` wrote."""
        target = tuple(TargetPass(*p) for p in curve["target"])
        return cls(target, tuple(DrafterPass(*p) for p in curve["drafter"]), curve["host_s"])

    def _verifier(self, slots: int, width: int) -> TargetPass:
        found = _target_pass(self, slots, width)
        if found is None:
            raise ValueError(f"No measured target pass covers {slots} slots of width {width}.")
        return found


@lru_cache(maxsize=4096)
def _target_pass(curve: StepCurve, slots: int, width: int) -> TargetPass | None:
    covering = [p for p in curve.target if p.slots >= slots and p.width >= width]
    return min(covering, key=lambda p: (p.seconds, p.slots, p.width), default=None)


@lru_cache(maxsize=4096)
def _drafter_pass(curve: StepCurve, slots: int) -> DrafterPass | None:
    return min((p for p in curve.drafter if p.slots >= slots), default=None)


class Costs(Protocol):
    """What rounds cost: as measured before, or as seen since."""

    def covers(self, slots: int, draft_length: int) -> bool:
        """Tell whether anything is known about such a round."""

    def tokens_per_s(self, survival: ListLike[float], slots: int, draft_length: int) -> float:
        """Expect the tokens per second of all slots."""


class _Kind(NamedTuple):
    """What decides how long a round takes."""

    slots: int  # of the target's pass
    width: int  # of the target's pass
    has_drafts: bool


class _Seen(NamedTuple):
    """The last rounds of a kind."""

    factors: deque[float]  # seconds over what the curve says
    factor: float  # their median
    number: int  # of the last one


class LiveCurve:
    """A step curve that the rounds of a job correct; the engine owns it.

    Passes were measured alone, behind short prompts, and perhaps while the machine was busy. A kind
    of round that was seen of late takes the median of those times. Any other one is taken to be as
    far off as the best of them. Where so many slots drafted, the better is believed, that or the
    curve, so that drafts that cost more than was measured are given up. Where they did not, nobody
    hopes: `next_pace` tries drafts now and then anyway.

    Args:
        curve: as measured before the job.
    """

    def __init__(self, curve: StepCurve) -> None:
        self._curve = curve
        self._seen: dict[_Kind, _Seen] = {}
        self._num_rounds = 0
        self._best = 1.0  # factor that was seen
        self._drafted: set[int] = set()  # slots for which some draft length was seen

    def add(self, slots: int, draft_length: int, seconds: float) -> None:
        """Learn from a round whose passes ran over so many slots."""
        self._num_rounds += 1
        if not self.covers(slots, draft_length):
            return
        kind = self._kind(slots, draft_length)
        known = self._known(kind)
        factors = known.factors if known else deque(maxlen=_MOST_SEEN)
        factors.append(seconds / self._curve.round_s(slots, draft_length))
        self._seen[kind] = _Seen(factors, median(factors), self._num_rounds)
        usual = {kind: seen.factor for kind, seen in self._seen.items() if self._is_usual(kind)}
        self._best = min(usual.values(), default=1.0)
        self._drafted = {kind.slots for kind in usual if kind.has_drafts}

    def covers(self, slots: int, draft_length: int) -> bool:
        """Tell whether passes for such a round were measured."""
        return self._curve.covers(slots, draft_length)

    def tokens_per_s(self, survival: ListLike[float], slots: int, draft_length: int) -> float:
        """Expect the tokens per second of all slots."""
        kind = self._kind(slots, draft_length)
        if self._is_usual(kind):
            factor = self._seen[kind].factor
        else:
            factor = min(1.0, self._best) if kind.slots in self._drafted else self._best
        return self._curve.tokens_per_s(survival, slots, draft_length) / factor

    def _kind(self, slots: int, draft_length: int) -> _Kind:
        return _Kind(*self._curve.shape(slots, 1 + draft_length), draft_length > 0)

    def _is_usual(self, kind: _Kind) -> bool:
        """Whether what such a round takes is known."""
        known = self._known(kind)
        return known is not None and len(known.factors) >= _LEAST_SEEN

    def _known(self, kind: _Kind) -> _Seen | None:
        seen = self._seen.get(kind)
        is_fresh = seen is not None and self._num_rounds - seen.number < _STALE_ROUNDS
        return seen if is_fresh else None


def accept_length(survival: ListLike[float], width: int) -> float:
    """Expect the tokens of one slot and round, the bonus included; survival is by position."""
    return 1 + sum(survival[: width - 1])


@dataclass(frozen=True, slots=True)
class Plan:
    """How a job is decoded."""

    slots: int
    draft_length: int  # 0: without speculation
    tokens_per_s: float  # expected, of all slots together
    why: str  # one sentence for people


def best_plan(
    curve: StepCurve,
    survival: ListLike[float],
    *,
    slots: int | None = None,
    draft_length: int | None = None,
    most_slots: int | None = None,
) -> Plan:
    """Choose slots and draft length for the most tokens per second of the whole job.

    Plans within 1 % of the best are equal: fewer slots win, then the shorter draft.

    Args:
        curve: of this machine.
        survival: [K] for a block of K positions.
        slots: taken as it is; None: to be chosen.
        draft_length: taken as it is; None: to be chosen, 0 included.
        most_slots: that memory has room for, where they are to be chosen; None: no limit.

    Raises:
        ValueError: no measured pass covers what is asked for, or the block is shorter.
    """
    counts = _slot_counts(curve, most_slots) if slots is None else [slots]
    lengths = [k for k in range(len(survival) + 1) if draft_length in (None, k)]
    plans = [(s, k) for s in counts for k in lengths if s > 0 and curve.covers(s, k)]
    rates = {plan: curve.tokens_per_s(survival, *plan) for plan in plans}
    if not rates:
        raise ValueError(
            f"No plan for slots {slots}, at most {most_slots}, and draft length {draft_length}: "
            f"the block has {len(survival)} positions, and measured was {curve}."
        )
    best = max(rates.values())
    chosen = min(plan for plan, rate in rates.items() if rate >= (1 - _TIE) * best)
    plain = max(curve.tokens_per_s(survival, s, 0) for s, _ in rates)
    return Plan(*chosen, rates[chosen], _why(chosen, rates, plain))


def can_pay(curve: StepCurve, slots: int, most_drafts: int) -> bool:
    """Tell whether drafts would pay if all were right; if nothing was measured, they might."""
    certain = [1.0] * most_drafts
    return not curve.covers(slots, 0) or _best_length(curve, certain, slots, shortest=0) > 0


def best_count(curve: StepCurve, survival: ListLike[float], active: int, most: int) -> int:
    """Choose how many sequences decode next, of `active` ones up to `most`: the most tokens/s.

    A few more than a pass holds would pad the next larger one. They wait for others to come, or to
    end. What no measured pass covers is not for the curve to refuse.
    """
    if not curve.covers(most, 0):
        return most
    counts = [count for count in _slot_counts(curve, most) if count > active] + [max(1, active)]

    def rate(count: int) -> float:
        return curve.tokens_per_s(survival, count, _best_length(curve, survival, count, shortest=0))

    return max(counts, key=lambda count: (rate(count), count))


def _slot_counts(curve: StepCurve, most_slots: int | None) -> set[int]:
    """Return the counts that pad nothing, and the most there may be."""
    counts = {p.slots for p in curve.target + curve.drafter}
    most = max(counts) if most_slots is None else most_slots
    return {min(count, most) for count in counts}


def _why(chosen: tuple[int, int], rates: Mapping[tuple[int, int], float], plain: float) -> str:
    slots, draft_length = chosen
    ranked = sorted(rates, key=rates.__getitem__, reverse=True)
    close = [p for p in ranked if p != chosen and rates[p] >= (1 - _CLOSE) * rates[chosen]]
    listed = ", ".join(f"{s} with {k}" for s, k in close[:3]) + ", ..." * (len(close) > 3)
    others = f"{len(close)} other plan{'s' * (len(close) > 1)} within 3 %: {listed}"
    return (
        f"slots {slots}, draft length {draft_length}: {rates[chosen]:.1f} tokens/s expected; "
        f"{others if close else 'no other plan within 3 %'}; without speculation {plain:.1f}"
    )


class _Draft(NamedTuple):
    """A draft, so that sorted ones begin with the likeliest; of equals, with the earlier."""

    minus_survival: float
    position: int  # 1..K
    slot: int


def verify_lengths(
    survival: ListLike[ListLike[float]],
    seconds: Callable[[int, int], float],
    *,
    stop_early: bool,
    by_position: bool = False,
) -> list[int]:
    """Choose how many drafts of each slot a round verifies, for the most tokens per second.

    Drafts are admitted step by step, and the best beginning of this path wins, the shortest of
    equals. The paper's step is a single draft, the likeliest left: right where a pass costs by its
    number of tokens. A rectangular pass costs by its width, and drafts within a width that is paid
    for are free, but a single one seldom pays. With `by_position` a step is therefore the next
    position of all slots, and without the early stop no other choice is better.

    Where the rejection rule samples, a draft may be admitted only by what is known without it.
    A survival tells about the drafts before its own, and a step admits at most one draft of a slot,
    the one behind those that are in. So on either path, what decides until the first step without
    gain comes from admitted drafts; stopping there is causal, looking further is not. What it
    costs: a width that pays only together with the next one is not found. A width that is fixed
    before the round, from earlier rounds (`next_pace`), is causal too and finds it. At temperature
    0 and under coupled sampling every choice is lossless.

    Args:
        survival: [slots][K], calibrated running products: none is above the one before.
        seconds: of the round, from its number of tokens, anchors included, and its width.
        stop_early: end at the first step without gain.
        by_position: a step is one position of all slots, not one draft.

    Returns:
        By slot, 0..K.

    Source:
        DSpark, Algorithm 1 and appendix A; the steps by position are ours.
    """
    num_slots, width, expected = len(survival), 1, float(len(survival))
    best, best_len = expected / seconds(num_slots, width), 0
    path: list[_Draft] = []
    for step in _steps(survival, by_position=by_position):
        path += step
        width = max(width, 1 + step[0].position)
        expected -= sum(draft.minus_survival for draft in step)
        rate = expected / seconds(num_slots + len(path), width)
        if rate > best:
            best, best_len = rate, len(path)
        elif stop_early:
            break
    verify_len = {draft.slot: draft.position for draft in path[:best_len]}
    return [verify_len.get(slot, 0) for slot in range(num_slots)]


def _steps(survival: ListLike[ListLike[float]], *, by_position: bool) -> list[list[_Draft]]:
    """Return the drafts that may survive, in the order in which they are admitted."""
    drafts = [
        _Draft(-chance, position, slot)
        for slot, block in enumerate(survival)
        for position, chance in enumerate(block, 1)
        if chance > 0
    ]
    if not by_position:
        return [[draft] for draft in sorted(drafts)]
    drafts.sort(key=attrgetter("position"))
    return [list(step) for _, step in groupby(drafts, key=attrgetter("position"))]


class Acceptance:
    """Learns from rounds how far drafts survive, and forgets old ones; the engine owns it.

    A position that was hardly reached is taken to be like the one before it, and the first one to
    be like the prior. So what is not drafted for long is believed in again, and tried. The prior is
    that of a very good pair: a hope that fails is given up after a few rounds, and what is never
    tried is never known.

    Args:
        slots: that report rounds; a round counts half after 256 more, or 8 of each slot.
        prior: the chance that a first draft is accepted.
        prior_weight: rounds that the prior, or the position before, counts for.
    """

    def __init__(self, slots: int = 1, *, prior: float = 0.9, prior_weight: float = 16) -> None:
        self._prior, self._prior_weight = prior, prior_weight
        self._fade = 0.5 ** (1 / max(_HALF_LIFE, _HALF_LIFE_OF_EACH * slots))
        self._seen: list[tuple[float, float]] = []  # by position: accepted, reached; faded

    def add(self, num_accepted: int, num_drafted: int) -> None:
        """Learn from a round of one slot, of which num_drafted were verified, maybe none.

        Raises:
            ValueError: more were accepted than verified, or fewer than none.
        """
        if not 0 <= num_accepted <= num_drafted:
            raise ValueError(f"{num_accepted} of {num_drafted} drafts accepted: expected 0 to all.")
        num_reached = min(num_accepted + 1, num_drafted)  # behind a miss nothing is known
        self._seen += [(0.0, 0.0)] * (num_reached - len(self._seen))
        self._seen = [
            (self._fade * accepted + (k < num_accepted), self._fade * reached + (k < num_reached))
            for k, (accepted, reached) in enumerate(self._seen)
        ]

    def survival(self, draft_length: int) -> tuple[float, ...]:
        """Estimate, by position, the chance that all drafts up to it are accepted."""
        weight, conditional, survival = self._prior_weight, self._prior, [1.0]
        unseen = [(0.0, 0.0)] * (draft_length - len(self._seen))
        for accepted, reached in (self._seen + unseen)[:draft_length]:
            conditional = (accepted + weight * conditional) / (reached + weight)
            survival.append(survival[-1] * conditional)
        return tuple(survival[1:])


@dataclass(frozen=True, slots=True)
class Pace:
    """How the next round drafts."""

    draft_length: int
    num_plain: int = 0  # rounds since speculation did not pay, trials included; 0: it pays


def next_pace(pace: Pace, costs: Costs, survival: ListLike[float], slots: int) -> Pace:
    """Choose the draft length of the next round, given that of the last.

    Rounds without drafts teach nothing about drafts. So after every 256 of them, 4 rounds try the
    draft length that loses least; after more than 256 where that costs more than 2 % of the time.

    Args:
        pace: of the last round.
        costs: of rounds on this machine.
        survival: [K] as it is estimated now.
        slots: that are active now.
    """
    was_plain = pace.draft_length == 0
    current = 0 if pace.num_plain > 0 else pace.draft_length
    draft_length = next_draft_length(costs, survival, slots, current)
    if draft_length > 0:
        return Pace(draft_length)
    trial = _best_length(costs, survival, slots, shortest=1)
    most_plain = _rounds_until_trial(costs, survival, slots, trial)
    num_plain = 1 + (min(pace.num_plain, most_plain) if was_plain else pace.num_plain)
    if num_plain > most_plain + _TRIAL_ROUNDS:
        return Pace(0, num_plain=1)
    return Pace(trial if num_plain > most_plain else 0, num_plain)


def _rounds_until_trial(
    costs: Costs, survival: ListLike[float], slots: int, draft_length: int
) -> int:
    """Say how many rounds without drafts make up for what a trial may lose."""
    if draft_length == 0:
        return _PLAIN_ROUNDS
    plain, trial = (costs.tokens_per_s(survival, slots, k) for k in (0, draft_length))
    rounds_lost = accept_length(survival, 1 + draft_length) * (plain / trial - 1)  # by each
    return max(_PLAIN_ROUNDS, ceil(_TRIAL_ROUNDS * rounds_lost / _TRIAL_SHARE))


def next_draft_length(costs: Costs, survival: ListLike[float], slots: int, current: int) -> int:
    """Choose the draft length for so many active slots; a change must gain 3 %."""
    best = _best_length(costs, survival, slots, shortest=0)
    if not costs.covers(slots, current):
        return best
    least = (1 + _CLOSE) * costs.tokens_per_s(survival, slots, current)
    return best if costs.tokens_per_s(survival, slots, best) >= least else current


def _best_length(costs: Costs, survival: ListLike[float], slots: int, *, shortest: int) -> int:
    """Return the best draft length that was measured, the shortest of equals; 0 for none."""
    lengths = [k for k in range(shortest, len(survival) + 1) if costs.covers(slots, k)]
    return max(lengths, key=lambda k: costs.tokens_per_s(survival, slots, k), default=0)
