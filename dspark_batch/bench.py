"""Measure a pair on a person's own prompts: plain decoding, speculation, mlx-lm; one process.

    read -> map -> for each turn, in another order each time: who answers all of it, and how fast

No rows are written, and nothing is learnt: each turn begins as a run would.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from dspark_batch.audit.replay import Baseline, Claim, Difference, compare
from dspark_batch.errors import EqualityError, UsageError
from dspark_batch.intake.mapping import Render, to_request
from dspark_batch.intake.reader import ALL, STDIN, fetch, locate, read
from dspark_batch.opening import load, open_baseline
from dspark_batch.output.plan import plan_of, plan_text
from dspark_batch.output.report import Tick
from dspark_batch.record.named_columns import wanted_columns
from dspark_batch.record.rows import ratio
from dspark_batch.spec.spec import Spec, number_or_none
from dspark_batch.types import Completion, Failure, Item, Json, Outcome, Request, Said

if TYPE_CHECKING:
    from dspark_batch.engine.setup import Setup
    from dspark_batch.models.hub import Download
    from dspark_batch.pair import Pair

__all__ = ["Comparison", "Standing", "bench"]

Name: TypeAlias = Literal["plain decoding", "speculation", "mlx-lm"]
PLAIN: Name = "plain decoding"
SPECULATION: Name = "speculation"
MLX_LM: Name = "mlx-lm"

_FIRST_FAILURES = 3
_MOST_KEPT = 100  # differences of one contestant; the others are counted


class Contestant(NamedTuple):
    """Somebody who answers requests."""

    slots: int  # answers that it decodes together
    # As a run does that begins now, in any order.
    generate: Callable[[Iterable[Request]], Iterator[Outcome]]


class Contest(NamedTuple):
    """A loaded pair, and who decodes with it."""

    contestants: Mapping[Name, Contestant]  # plain decoding is the first
    render: Render
    context_length: int  # most positions of prompt and answer together
    baseline: Baseline  # plain decoding again, which measures how clear a choice is
    divergence: float  # of a logit from mlx-lm's, at most; as the set-up measured it
    facts: Mapping[str, str]  # what people should know of the machine and the plan


OpenContest: TypeAlias = Callable[[Spec, int], Contest]
Observe: TypeAlias = Callable[[Tick], None]


@dataclass(slots=True, kw_only=True)
class Standing:
    """How one contestant did."""

    name: Name
    slots: int
    seconds: list[float] = field(default_factory=list)  # of each turn, prompts included
    completion_tokens: int = 0  # of a turn
    accept_length: float | None = None  # tokens per round, bonus included; None: it drafts nothing
    equal: int = 0  # answers that are those of plain decoding, token for token, in every turn
    different: int = 0
    differences: list[Difference] = field(default_factory=list)  # the first ones

    @property
    def tokens_per_s(self) -> float:
        """The median of the turns without the first one, which warms up."""
        return self.completion_tokens / median(self.seconds[1:] or self.seconds)

    @property
    def near_ties(self) -> int:
        """How many of the differences rounding can make."""
        return sum(each.verdict == "near-tie" for each in self.differences)

    @property
    def spread(self) -> float | None:
        """The largest distance of two logits at which it differs; None: it nowhere does."""
        spreads = [each.spread for each in self.differences if each.spread is not None]
        return max(spreads, default=None)


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Who answered the same prompts how fast, and whether with the same tokens."""

    items: int  # that were asked
    turns: int  # of each of them; the first one counts only if there is no other
    prompt_tokens: int
    divergence: float  # two logits may be rounded towards each other by twice this
    facts: Mapping[str, str]
    standings: list[Standing]  # plain decoding is the first
    not_asked: Counter[str] = field(default_factory=Counter)  # error.code -> records
    first_failures: list[str] = field(default_factory=list)  # messages, in input order
    left_out: dict[str, str] = field(default_factory=dict)  # contestant -> why

    @property
    def plain(self) -> Standing:
        """Plain decoding, with which the others are compared."""
        return self.standings[0]

    @property
    def speculation(self) -> Standing | None:
        """Speculation; None: there is no drafter."""
        return next((each for each in self.standings if each.name == SPECULATION), None)

    @property
    def exit_code(self) -> int:
        """3: plain decoding and speculation differ, or plain decoding differs from itself."""
        ours = [each for each in self.standings if each.name != MLX_LM]
        return EqualityError.exit_code if any(each.different for each in ours) else 0

    def times_plain(self, standing: Standing) -> float:
        """Say how many times as fast as plain decoding it was."""
        return standing.tokens_per_s / self.plain.tokens_per_s

    def to_json(self) -> dict[str, Json]:
        """Give all that was found."""
        standings = [
            asdict(each)
            | {"tokens_per_s": each.tokens_per_s, "times_plain": self.times_plain(each)}
            | {"near_ties": each.near_ties, "spread": each.spread}
            for each in self.standings
        ]
        rest = asdict(replace(self, not_asked=Counter(), standings=[]))
        return rest | {"standings": standings, "not_asked": dict(self.not_asked)}


def _ignore(tick: Tick) -> None:
    """Watch nothing."""


def bench(
    spec: Spec,
    *,
    turns: int = 4,
    outside: bool = True,
    observe: Observe = _ignore,
    open_contest: OpenContest | None = None,
) -> Comparison:
    """Answer the same prompts plainly, with speculation and by mlx-lm, in turns.

    The first turn warms up, and counts only if it is the only one. Of a conversation with several
    questions the first is asked.

    Args:
        spec: what a run would be given; its `out` is never written, so "-" will do.
        turns: how many times each of them answers everything, at least 1.
        outside: whether mlx-lm takes part; it does not if an item is sampled.
        observe: called with a `Tick` when models are loaded and after every answer.
        open_contest: loads the pair, `open_pair_for` by default.

    Raises:
        UsageError: there is nothing to ask.
        ModelError: the pair cannot be loaded.
    """
    if STDIN in spec.inputs:
        raise UsageError("-: bench reads its input more than once; save it to a file first.")
    if turns < 1:
        raise UsageError(f"turns is {turns}, expected 1 or more.")
    records = _records(spec)
    tick = Tick("load", len(records), 0, 0, 0)
    observe(tick)
    open_contest = open_contest or partial(open_pair_for, on_download=_told(tick, observe))
    contest = open_contest(spec, len(records))
    asked, failures = _mapped(records, spec, contest)
    if not asked:
        reason = f" ({failures[0].message})" if failures else ""
        raise UsageError(f"{', '.join(spec.inputs)}: nothing to ask{reason}.")
    contest, left_out = _taking_part(contest, asked, outside=outside)
    race = _Race(contest, asked, turns, observe)
    race.run()
    return replace(
        race.comparison(),
        not_asked=Counter(each.code for each in failures),
        first_failures=[each.message for each in failures[:_FIRST_FAILURES]],
        left_out=left_out,
    )


def _records(spec: Spec) -> list[Item | Failure]:
    """Read all of the input; what has to be downloaded is gone afterwards."""
    with TemporaryDirectory(prefix="dspark-batch-") as folder:
        sources = locate(spec.inputs, Path(folder), Path(folder), wanted_columns(spec))
        fetch(sources)
        return list(read(sources, ALL if spec.limit is None else range(spec.limit)))


def open_pair_for(
    spec: Spec, num_items: int, on_download: Callable[["Download"], None] | None = None
) -> Contest:
    """Load a pair, and set up who decodes with it."""
    from dspark_batch.answers.who_drafts import with_look_ups
    from dspark_batch.baseline.outside import generate_outside
    from dspark_batch.engine.engine import Engine
    from dspark_batch.engine.setup import set_up
    from dspark_batch.models.thinking import settle_thinking

    pair = load(spec, None, on_download)
    if spec.lookup:
        pair = with_look_ups(pair)
    thinking = settle_thinking(pair.reader, spec.thinking, spec.family, spec.target, spec.drafter)
    asked = number_or_none(spec.draft_length)
    planned = partial(
        set_up,
        pair,
        slots=number_or_none(spec.slots),
        max_tokens=spec.max_tokens,
        num_items=num_items,
    )
    plainly = planned(draft_length=0)
    setup = planned(draft_length=asked, known=plainly.conformance)

    def engine(setup: "Setup", **settings: Any) -> Contestant:
        """Make a contestant that is set up anew for every turn, as for a job that begins now."""

        def generate(stream: Iterable[Request]) -> Iterator[Outcome]:
            return Engine(
                pair,
                slots=setup.plan.slots,
                shapes=setup.shapes,
                most_positions=setup.most_positions,
                state_positions=setup.state_positions,
                prefix_positions=0 if spec.no_prefix_cache else setup.prefix_positions,
                **settings,
            ).generate(stream)

        return Contestant(setup.plan.slots, generate)

    contestants = {
        PLAIN: engine(plainly, draft_length=0),
        SPECULATION: engine(
            setup,
            draft_length=asked,
            confidence_threshold=spec.confidence_threshold,
            lookup=spec.lookup,
            lengths=setup.lengths,
            costs=setup.costs,
        ),
        MLX_LM: Contestant(plainly.plan.slots, partial(generate_outside, pair, plainly.plan.slots)),
    }
    if not setup.plan.draft_length:
        del contestants[SPECULATION]
    return Contest(
        contestants,
        thinking.render,
        pair.config.context_length,
        open_baseline(pair, plainly, thinking.split),
        setup.conformance.divergence,
        _facts(pair, setup),
    )


def _facts(pair: "Pair", setup: "Setup") -> dict[str, str]:
    """Say what was measured where."""
    import mlx.core as mx

    from dspark_batch import blas, device

    on_gpu = device.is_gpu()
    facts = {"device": str(mx.device_info().get("device_name", "GPU")) if on_gpu else "CPU"}
    if not on_gpu:
        facts["blas"] = blas.identity()
    return {
        "target": str(pair.config.identity["target"]),
        "drafter": str(pair.config.identity["drafter"]),
        **facts,
        "plan": plan_text(plan_of(setup.to_json())),
    }


def _told(tick: Tick, observe: Observe) -> Callable[["Download"], None]:
    """Turn news of a download into ticks."""

    def tell(download: "Download") -> None:
        done, total = download.done_bytes / 1e9, download.total_bytes / 1e9
        doing = f"downloading {download.name}, {done:.2f} of {total:.2f} GB"
        observe(replace(tick, doing=doing))

    return tell


def _mapped(
    records: Iterable[Item | Failure], spec: Spec, contest: Contest
) -> tuple[list[Request], list[Failure]]:
    """Tell what can be asked from what cannot."""
    asked: list[Request] = []
    failures: list[Failure] = []
    for record in records:
        mapped: Request | Failure = (
            to_request(record, spec, contest.render, contest.context_length)
            if isinstance(record, Item)
            else record
        )
        if isinstance(mapped, Failure):
            failures.append(mapped)
        else:
            asked.append(mapped)
    return asked, failures


def _taking_part(
    contest: Contest, asked: Sequence[Request], *, outside: bool
) -> tuple[Contest, dict[str, str]]:
    """Leave out who cannot answer all of it, and say why."""
    contestants = dict(contest.contestants)
    left_out: dict[str, str] = {}
    if SPECULATION not in contestants:
        left_out[SPECULATION] = "nobody drafts: there is no drafter, or --draft-length is 0"
    if not outside:
        contestants.pop(MLX_LM, None)
    elif not all(request.sampling.is_greedy for request in asked):
        del contestants[MLX_LM]
        left_out[MLX_LM] = "items are sampled, which mlx-lm does with other noise"
    elif any(request.sampling.is_own_way for request in asked):
        del contestants[MLX_LM]
        left_out[MLX_LM] = "items have penalties, biases or ends of their own"
    return contest._replace(contestants=contestants), left_out


class _Race:
    """Lets all contestants answer everything, turn by turn."""

    def __init__(
        self, contest: Contest, asked: Sequence[Request], turns: int, observe: Observe
    ) -> None:
        self._contest, self._asked, self._turns, self._observe = contest, asked, turns, observe
        self._standings = {
            name: Standing(name=name, slots=each.slots)
            for name, each in contest.contestants.items()
        }
        self._expected: dict[int, Outcome] = {}  # Item.index -> of plain decoding, the first time
        self._different: dict[Name, dict[int, Difference]] = {name: {} for name in self._standings}
        total = len(asked) * len(self._standings) * turns
        self._tick = Tick("decode", total, 0, 0, 0)

    def run(self) -> None:
        """Take all turns, each in another order."""
        self._observe(self._tick)
        names = list(self._standings)
        for turn in range(self._turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                self._take_turn(name, turn)

    def comparison(self) -> Comparison:
        """Sum it up."""
        for name, standing in self._standings.items():
            found = self._different[name]
            standing.different = len(found)
            standing.equal = len(self._asked) - len(found)
            standing.differences = [found[index] for index in sorted(found)][:_MOST_KEPT]
        return Comparison(
            items=len(self._asked),
            turns=self._turns,
            prompt_tokens=sum(len(request.prompt_ids) for request in self._asked),
            divergence=self._contest.divergence,
            facts=self._contest.facts,
            standings=list(self._standings.values()),
        )

    def _take_turn(self, name: Name, turn: int) -> None:
        outcomes: list[Outcome] = []
        began = time.perf_counter()
        for outcome in self._contest.contestants[name].generate(iter(self._asked)):
            outcomes.append(outcome)
            self._tell(f"turn {turn + 1} of {self._turns}: {name}")
        seconds = time.perf_counter() - began
        answers = [each for each in outcomes if isinstance(each, Completion)]
        standing = self._standings[name]
        standing.seconds.append(seconds)
        standing.completion_tokens = sum(len(each.token_ids) for each in answers)
        if any(sum(each.num_drafted) for each in answers):
            lengths = [length for each in answers for length in each.accept_lengths]
            standing.accept_length = ratio(sum(lengths), len(lengths))
        self._compare(name, outcomes)

    def _tell(self, doing: str) -> None:
        self._tick = replace(self._tick, done=self._tick.done + 1, doing=doing)
        self._observe(self._tick)

    def _compare(self, name: Name, outcomes: Sequence[Outcome]) -> None:
        """Look for answers that are not those of plain decoding, which comes first."""
        if not self._expected:
            self._expected = {each.item.index: each for each in outcomes}
            return
        requests = {request.item.index: request for request in self._asked}
        for outcome in outcomes:
            index, different = outcome.item.index, self._different[name]
            if index in different:
                continue
            found = _difference(requests[index], outcome, self._expected[index], self._contest)
            if found is not None:
                different[index] = found


def _difference(
    request: Request, outcome: Outcome, expected: Outcome, contest: Contest
) -> Difference | None:
    """Compare an answer with that of plain decoding; None: they are the same."""
    if isinstance(outcome, Failure):
        if isinstance(expected, Failure):
            return None
        item = outcome.item
        return Difference(
            where=item.where,
            custom_id=item.custom_id,
            sample_index=item.sample_index,
            turn=0,
            position=None,
            row=f"a failure ({outcome.message})",
            baseline="an answer",
        )
    claim = Claim(
        request,
        outcome.text,
        token_ids=outcome.token_ids,
        finish_reason=outcome.finish_reason,
    )
    whole = contest.baseline._replace(split=partial(Said, None))  # reasoning and all
    return compare(claim, expected, whole, contest.divergence)
