"""How many drafts pay: the only place where seconds decide anything. They never decide a byte.

A job starts with a rule of what rounds cost. Rounds correct it, and show how far drafts survive.
Where drafts do not pay, the drafter rests: then decoding costs what it costs without one.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import NamedTuple, TypeAlias

import numpy as np

_CLOSE = 0.03  # a draft length that is better by less is not worth a change
_HOPE = 1.07  # how much better an untried draft length may be than the costs say
_HOPE_PLAIN = 2.0  # the same for no drafts: the rule knows least how they compare
_TRIAL_ROUNDS = 3
_NEARLY = 0.03  # drafts that promise less than the best by so much are as good for a beginning
_TRIAL_SHARE = 0.6  # of the time until then is what a trial may take: a short job tries little
_LEAST_SEEN, _MOST_SEEN = 3, 31  # rounds of a kind, that say what such a round takes
_TELLING = 8  # rounds of a kind, before it says how slow the machine is
_LAST_ROUNDS = 7  # that say how slow the machine is just now
_LASTING_ROUNDS, _LASTING = 47, 0.05  # as slow for so long: what was known is of another time
_SURE_SEEN = 15  # rounds without drafts, before the drafter may rest
_LEAST_S = 1e-9  # of a round: a clock may stand still
_ESTIMATE_EVERY = 16  # rounds; it takes a good part of what the host has to do between two
_YOUNG_JOB = 32  # rounds in which each one's draft length is chosen anew
_SETTLED = 4  # rounds for which a draft length that was chosen twice stays; choosing takes time
_LONG_JOB = 128  # rounds after which it was tried once how long they take without drafts
_LEAST_DRAFTED = 3  # rounds with drafts before they can be given up, whatever a hint says
_LEAST_IF_CLEAR, _CLEAR = 2, 1.3  # of them, where rounds of the other kind are so much better
_LEAST_IF_ODD, _ODD = 6, 2.0  # of them, where they take so much longer than by the rule
# Rounds without drafts, and how much better they may be if so few were seen: another look.
_DOUBTS = ((6, 1.7), (8, 1.3), (15, 1.15))
_LOOK_SHARE = 0.08  # of the time since a trial is what another look may take
_LEAST_KEPT = 8  # rounds with drafts, before what rounds take is kept for other jobs
_STALE_ROUNDS = 512  # without one of a kind, until nothing is known of it
_FIRST_REST, _LONGEST_REST = 1024, 4096  # rounds without drafts before they are tried again
_HALF_LIFE = 256  # rounds of single slots until a round counts half
_HALF_LIFE_OF_EACH = 8  # with many slots, rounds of each
_RULE_WEIGHT = 0.3  # of the rule, where each kind of round that was seen has 1
_LEAST_SHARE = 0.02  # of what the rule says that a part of a round costs at least

# Parts of a round: a target pass, each of its tokens, a drafter's pass, each of its drafts.
Weights: TypeAlias = tuple[float, float, float, float]


class Kind(NamedTuple):
    """What decides how long a round takes."""

    slots: int  # over which its passes run
    draft_length: int
    is_jump: bool = False  # whether its drafts are known without a drafter's pass
    rests: bool = False  # whether the drafter rests, so that its context is not kept

    @property
    def is_drafted(self) -> bool:
        """Whether a drafter ran."""
        return self.draft_length > 0 and not self.is_jump

    @property
    def parts(self) -> Weights:
        """How often each part of a round is in it."""
        drafts = float(self.is_drafted)
        tokens = float(self.slots * (1 + self.draft_length))
        return 1.0, tokens, drafts, drafts * self.slots * self.draft_length


def _sum_of(weights: Weights, parts: Weights) -> float:
    """Add up what the parts of a round cost."""
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def _weights(found: np.ndarray) -> Weights:
    """Take the weights out of an array."""
    one, token, passed, draft = found.tolist()
    return one, token, passed, draft


class _Seen(NamedTuple):
    """The last rounds of a kind."""

    seconds: deque[float]
    number: int  # of the last one
    total: int  # how many there were

    @property
    def usual_s(self) -> float:
        """The lower quartile: what disturbs a round, or is new to it, makes it slower."""
        return sorted(self.seconds)[len(self.seconds) // 4]


class Costs:
    """What rounds take, from a rule that the rounds of a job correct; the engine owns it.

    A kind of round that was seen of late takes what its last ones took. Of others the parts
    are estimated, from all kinds that were seen and, with little weight, from the rule.

    A machine is slower while others use it. How much slower shows in rounds of kinds that are
    known, and is taken out of all: so a kind that was last seen in a slow minute is not worse.

    Args:
        rule: what the parts of a round cost, in any unit.
        upkeep: the share of a round without drafts in which the drafter's context is kept; what a
            round takes without, while none was seen.

    Attributes:
        num_rounds: that were seen.
        num_drafted: of these with drafts.
        seconds: that they took.
    """

    def __init__(self, rule: Weights, upkeep: float = 0.0) -> None:
        self._rule: Weights = _weights(np.maximum(rule, 1e-9))
        self._upkeep = upkeep
        self._seen: dict[Kind, _Seen] = {}
        self.num_rounds = self.num_drafted = 0
        self.seconds = 0.0
        self._weights: Weights | None = None  # seconds of each part; None: to be estimated
        # What rounds took over what they do.
        self._slowness = deque([1.0] * _LASTING_ROUNDS, maxlen=_LASTING_ROUNDS)

    def add(self, kind: Kind, seconds: float) -> None:
        """Learn from a round."""
        self.num_rounds += 1
        self.num_drafted += kind.is_drafted
        known = self._fresh(kind)
        times = known.seconds if known else deque(maxlen=_MOST_SEEN)
        seconds = max(seconds, _LEAST_S)
        self.seconds += seconds
        if self.is_known(kind, _TELLING):
            self._slowness.append(seconds / median(self._seen[kind].seconds))
        times.append(seconds / median([*self._slowness][-_LAST_ROUNDS:]))
        self._seen[kind] = _Seen(times, self.num_rounds, known.total + 1 if known else 1)
        lasting = median(self._slowness)
        if abs(lasting - 1) > _LASTING:
            self._begin_anew(kind, lasting)
        if len(times) <= _LEAST_SEEN or self.num_rounds % _ESTIMATE_EVERY == 0:
            self._weights = None

    def _begin_anew(self, kind: Kind, slowness: float) -> None:
        """Take a kind of round to be as slow as it has been for long.

        If it was well known before, the machine has changed, and all other kinds are so slow, too.
        Else what it takes was known badly.
        """
        has_changed = self._seen[kind].total >= _MOST_SEEN
        for each in list(self._seen) if has_changed else [kind]:
            seconds, *rest = self._seen[each]
            times = deque((slowness * one for one in seconds), maxlen=_MOST_SEEN)
            self._seen[each] = _Seen(times, *rest)
        self._slowness.extend([1.0] * _LASTING_ROUNDS)
        self._weights = None

    @property
    def has_plain(self) -> bool:
        """Whether any rounds without drafts were seen."""
        return any(kind.draft_length == 0 and self.is_known(kind) for kind in self._seen)

    @property
    def saw_plain(self) -> bool:
        """Whether any round without drafts was seen of late, even one."""
        return any(kind.draft_length == 0 and self._fresh(kind) for kind in self._seen)

    def is_known(self, kind: Kind, least: int = _LEAST_SEEN) -> bool:
        """Whether what such a round takes was seen of late, in so many rounds."""
        seen = self._fresh(kind)
        return seen is not None and len(seen.seconds) >= least

    def round_s(self, kind: Kind) -> float:
        """Expect the seconds of a round, or its cost by the rule while none was seen."""
        if self.is_known(kind):
            return self._seen[kind].usual_s
        if kind.rests:
            return (1 - self._upkeep) * self.round_s(kind._replace(rests=False))
        return _sum_of(self.weights(), kind.parts)

    def worth(self, runs: ListLike[int], slots: int, lengths: Iterable[int]) -> int:
        """Choose how many drafts pay where they are certain, and known without a drafter's pass.

        Args:
            runs: by sequence, how many of its next tokens are known.
            slots: over which the round's pass runs.
            lengths: numbers of drafts to choose from.
        """

        def rate(length: int) -> float:
            tokens = sum(1 + min(run, length) for run in runs)
            return tokens / self.round_s(Kind(slots, length, is_jump=length > 0))

        return max(lengths, key=rate)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether rounds of both kinds were seen, with drafts and without."""
        return self.has_plain and self.num_drafted >= _LEAST_KEPT

    def is_odd(self, kind: Kind, plain: Kind) -> bool:
        """Whether rounds take far longer, beside plain ones, than the rule says."""
        by_rule = _sum_of(self._rule, kind.parts) / _sum_of(self._rule, plain.parts)
        return self.round_s(kind) > _ODD * by_rule * self.round_s(plain)

    def weights(self) -> Weights:
        """Estimate what the parts of a round cost."""
        if self._weights is None:
            self._weights = self._estimated()
        return self._weights

    def _estimated(self) -> Weights:
        fresh = [kind for kind in self._seen if self._fresh(kind)]
        if not fresh:
            return self._rule
        parts = np.array([kind.parts for kind in fresh])
        seconds = np.array([self._with_context_s(kind) for kind in fresh])
        rule = np.array(self._rule)
        rule *= median(seconds / (parts @ rule))
        # In shares: each kind's seconds are 1, and so is each part of the rule.
        rows = np.vstack([parts * rule / seconds[:, None], _RULE_WEIGHT * np.eye(len(rule))])
        wanted = np.concatenate([np.ones(len(fresh)), np.full(len(rule), _RULE_WEIGHT)])
        shares, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
        return _weights(rule * np.maximum(shares, _LEAST_SHARE))

    def _with_context_s(self, kind: Kind) -> float:
        """Say what a round of a kind that was seen takes, or would if the context was kept."""
        return self._seen[kind].usual_s / ((1 - self._upkeep) if kind.rests else 1)

    def _fresh(self, kind: Kind) -> _Seen | None:
        seen = self._seen.get(kind)
        is_fresh = seen is not None and self.num_rounds - seen.number < _STALE_ROUNDS
        return seen if is_fresh else None


class Acceptance:
    """Learns from rounds how far drafts survive, and forgets old ones; the engine owns it.

    A position that was hardly reached is taken to be like the one before it, and the first one to
    be like the prior. The prior is that of a very good pair: a hope that fails is given up after a
    few rounds, and what is never tried is never known.

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

    def hope_again(self) -> None:
        """Forget all: what is known is old."""
        self._seen = []


@dataclass(frozen=True, slots=True)
class Step:
    """How the next round drafts."""

    draft_length: int
    keeps_context: bool = True  # whether the drafter is kept ready


class Pace:
    """Chooses each round's draft length; the engine owns it.

    It begins with few drafts where many would hardly be better, drafts what pays, and tries what
    might. What it tries takes a share of the time that went by: where a pass holds many slots, one
    without drafts is cheap, and is tried after a round or two. When no drafts pay, the drafter
    rests: its context is not kept, which takes time, too. After 1,024 rounds, and each time after
    twice as many, it is kept for newcomers again. Once half of the slots can draft, drafts are
    tried.

    Args:
        costs: of rounds.
        acceptance: of drafts.
        lengths: draft lengths that may be chosen, ascending; 0 is one of them.
        slots: over which the first rounds run.
    """

    def __init__(
        self, costs: Costs, acceptance: Acceptance, lengths: Iterable[int], slots: int = 1
    ) -> None:
        self._costs = costs
        self._acceptance = acceptance
        self._lengths = tuple(lengths)
        self._trial: list[int] = []  # draft lengths of the next rounds
        self._tried_s = 0.0  # of rounds, until the last trial began
        self._settled = 0  # rounds for which the draft length stays
        self._slots = slots  # over which the last round ran
        self._rested = 0  # rounds since drafts did not pay; 0: they pay
        self._rest = _FIRST_REST
        self._drafted = tuple(k for k in self._lengths if k)
        self._num_drafted = 0  # rounds that were chosen with drafts
        self._most_at_first = self._lengths[-1]  # until the first round's is chosen
        self._most_at_first = self._first(slots)
        self.step = Step(self._most_at_first)
        self._num_drafted += self.step.draft_length > 0

    def next(self, slots: int, served: int) -> Step:
        """Choose the draft length of the next round.

        Args:
            slots: over which its passes run.
            served: sequences that can draft, of those that decode.
        """
        if self._settled and slots == self._slots:
            self._settled -= 1
            return self.step
        before, self._slots, is_tried = self.step, slots, bool(self._trial)
        self.step = self._next(slots, served)
        self._num_drafted += self.step.draft_length > 0
        may_stay = not (is_tried or self._rested) and self._costs.num_rounds > _YOUNG_JOB
        if may_stay and self.step == before:
            self._settled = _SETTLED - 1
        return self.step

    def _next(self, slots: int, served: int) -> Step:
        if self._rested:
            return self._resting(slots, served)
        if self._trial:
            return Step(self._trial.pop())
        rates = self._rates(slots)
        best = self._best(rates)
        unseen = self._before_giving_up(slots, rates) if best == 0 else None
        if unseen is not None:
            return unseen
        untried = self._worth_a_trial(slots, best, rates)
        if untried is not None:
            return self._tried(untried)
        kind = Kind(slots, best)
        if self._looks_again(slots, best, rates):
            return self._tried(0)
        if best == 0 and self._costs.is_known(kind, _SURE_SEEN):
            return self._resting(slots, served)
        is_new = best != self.step.draft_length and not self._costs.is_known(kind)
        if is_new and self._costs.num_drafted >= _LEAST_DRAFTED:
            return self._tried(best)  # one round says little
        return Step(best)

    def _resting(self, slots: int, served: int) -> Step:
        self._rested += 1
        if self._rested <= self._rest:
            return Step(0, keeps_context=False)
        if 2 * served < slots:
            return Step(0)
        self._rested, self._rest = 0, min(2 * self._rest, _LONGEST_REST)
        self._acceptance.hope_again()
        return self._tried(self._in_question()[-1])

    def _before_giving_up(self, slots: int, rates: Mapping[int, float]) -> Step | None:
        """Find what must be seen before drafts are given up; None: enough was seen.

        Neither a hint nor a round that was disturbed decides that. Rounds with drafts, where they
        do not pay, are the dearest there are; so few have to do, but where they look disturbed.
        """
        num_drafted = self._costs.num_drafted
        if not self._drafted or num_drafted >= _LEAST_IF_ODD:
            return None
        best = max((k for k in rates if k), key=rates.__getitem__)
        if not self._costs.saw_plain:
            return self._tried(0)
        is_clear = _CLEAR * rates[best] < rates[0]
        least = _LEAST_IF_CLEAR if is_clear else _LEAST_DRAFTED
        if self._costs.is_odd(Kind(slots, best), Kind(slots, 0)):
            least = _LEAST_IF_ODD
        # What is estimated of rounds that nobody saw may be wrong by a quarter.
        is_sure = is_clear or self._costs.is_known(Kind(slots, best))
        return None if is_sure and num_drafted >= least else Step(best)

    def _looks_again(self, slots: int, best: int, rates: Mapping[int, float]) -> bool:
        """Whether no drafts, which were seen seldom and lost, are tried once more."""
        plain = Kind(slots, 0)
        doubts = (doubt for least, doubt in _DOUBTS if not self._costs.is_known(plain, least))
        if best == 0 or not self._costs.is_known(plain):
            return False
        trial_s = _TRIAL_ROUNDS * self._costs.round_s(plain)
        is_cheap = trial_s < _LOOK_SHARE * (self._costs.seconds - self._tried_s)
        return is_cheap and rates[0] * next(doubts, 1.0) > rates[best]

    def _first(self, slots: int) -> int:
        """Choose the draft length of the first round: the least that promises nearly most."""
        rates = self._rates(slots)
        most = max((rates[k] for k in self._drafted), default=0.0)
        return next((k for k in self._drafted if rates[k] >= (1 - _NEARLY) * most), 0)

    def _tried(self, draft_length: int) -> Step:
        self._tried_s = self._costs.seconds
        self._trial = [draft_length] * (_TRIAL_ROUNDS - 1)
        return Step(draft_length)

    def _best(self, rates: Mapping[int, float]) -> int:
        """The draft length that promises most; another than the last one must gain 3 %."""
        best = max(rates, key=rates.__getitem__)
        last = self.step.draft_length
        is_close = last in rates and rates[best] < (1 + _CLOSE) * rates[last]
        return last if is_close else best

    def _worth_a_trial(self, slots: int, best: int, rates: Mapping[int, float]) -> int | None:
        """Find a draft length whose rounds nobody has seen, and that might be better."""
        hope_plain = _HOPE if self._costs.saw_plain else _HOPE_PLAIN
        if not self._costs.has_plain and self._costs.num_rounds > _LONG_JOB:
            hope_plain = inf
        hopes = {
            k: rates[k] * (_HOPE if k else hope_plain)
            for k in rates
            if k != best and not self._costs.is_known(Kind(slots, k))
        }
        most = max(hopes, key=hopes.__getitem__, default=None)
        if most is None or hopes[most] <= rates[best]:
            return None
        usual, trial = Kind(slots, best), Kind(slots, most)
        until_now_s = self._costs.num_rounds * self._costs.round_s(usual)
        is_cheap = _TRIAL_ROUNDS * self._costs.round_s(trial) <= _TRIAL_SHARE * until_now_s
        return most if is_cheap and self._costs.is_known(usual) else None

    def _rates(self, slots: int) -> dict[int, float]:
        """Expect tokens per second of a slot, by draft length; without drafts, those of a rest."""
        survival = self._acceptance.survival(self._lengths[-1])
        return {
            k: accept_length(survival, 1 + k) / self._costs.round_s(Kind(slots, k, rests=k == 0))
            for k in self._in_question()
        }

    def _in_question(self) -> tuple[int, ...]:
        """List the draft lengths to choose from: for three rounds none longer than the first.

        Before a round is seen, many drafts are a hope, and may be dear.
        """
        if self._num_drafted >= _LEAST_DRAFTED:
            return self._lengths
        return tuple(k for k in self._lengths if k <= self._most_at_first)


def accept_length(survival: ListLike[float], width: int) -> float:
    """Expect the tokens of one slot and round, the bonus included; survival is by position."""
    return 1 + sum(survival[: width - 1])
