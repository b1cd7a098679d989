"""The engine half as a job sees it: how it is opened, and how items are asked in turns."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, runtime_checkable

from dspark_batch import blas
from dspark_batch.audit.replay import Against, Baseline, Margin
from dspark_batch.errors import UsageError
from dspark_batch.intake.mapping import Render, said_in, to_request
from dspark_batch.intake.question import num_turns
from dspark_batch.record.formats import Begun, Manifest
from dspark_batch.spec.spec import Spec, number_or_none
from dspark_batch.types import (
    Completion,
    Failure,
    Gauge,
    Item,
    Outcome,
    Partial,
    Request,
    Said,
    SetupJson,
)

if TYPE_CHECKING:
    from dspark_batch.engine.engine import Engine
    from dspark_batch.engine.setup import Setup
    from dspark_batch.models.hub import Download
    from dspark_batch.pair import Pair

log = logging.getLogger("dspark_batch")


# Is told the name of a worker, and the items that were in flight in it when it died.
Lost: TypeAlias = Callable[[str, Sequence[Item]], None]


def _silently() -> None:
    """Do nothing."""


class Generates(Protocol):
    """The engine, as far as a job knows it."""

    def generate(
        self, stream: Iterable[Request | Failure | None], may_begin: Callable[[Item], bool] = ...
    ) -> Iterator[Outcome]:
        """Answer a stream lazily, in the order in which answers finish; failures pass through.

        A None in the stream means: nothing right now. What is in flight goes on, and the stream is
        asked again. If nothing is in flight, this returns; whoever has more then calls it again
        with the same stream.

        `may_begin` is asked about each item right before it is generated; after a no, what is in
        flight is finished, and nothing more is begun.
        """
        ...


@runtime_checkable
class Steps(Protocol):
    """The engine, as far as who drives its rounds knows it; `engine.Engine` says what each does."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        ...

    def add(self, request: Request, *, urgent: bool = False) -> None:
        """Let a request wait."""
        ...

    def step(self) -> list[Outcome]:
        """Do one round."""
        ...

    def cancel(self, item: Item) -> None:
        """Give an item up."""
        ...

    def so_far(self, item: Item) -> Partial | None:
        """Tell what is committed of an answer."""
        ...


class Opened(NamedTuple):
    """A loaded engine half."""

    engine: Generates
    render: Render
    context_length: int  # most positions of prompt and answer together
    identity: Mapping[str, str | None]  # digests of what is loaded
    slots: int = 1  # that were chosen, or given
    setup: SetupJson | None = None  # plan, shape of passes, machine; None: there is none
    gauge: Callable[[], Gauge | None] = lambda: None  # how full the engine is; None: unknown
    split: Callable[[str], Said] = partial(Said, None)  # tells reasoning and answer apart
    baseline: Callable[[Against], Baseline] | None = None  # None: answers cannot be audited
    # Is told of seconds, between two answers, that were not the engine's.
    leave_out: Callable[[float], None] = lambda seconds: None
    keep_learnt: Callable[[], None] = _silently  # keeps what it learnt about speed
    decode: Callable[[Sequence[int]], str] = lambda token_ids: ""
    marks: Sequence[str] = ()  # the texts by which `split` tells reasoning and answer apart
    vocab_size: int = 1 << 31  # token ids are below it
    # Of a fleet: takes who is to be told what was in flight in a worker that died. None: items are
    # in flight in this process.
    tell_lost: Callable[[Lost], None] | None = None
    close: Callable[[], None] = _silently  # ends what goes on in other processes

    @property
    def steps(self) -> Steps:
        """The engine, for who drives its rounds.

        Raises:
            UsageError: it has none, as that of a job which shares one.
        """
        if not isinstance(self.engine, Steps):
            raise UsageError("this engine cannot be driven round by round; open a pair of its own.")
        return self.engine


OpenEngine: TypeAlias = Callable[[Spec, Manifest | None], Opened]  # None: it has not begun


def open_pair(
    spec: Spec,
    begun: Begun | None,
    on_download: Callable[["Download"], None] | None = None,
    num_items: int | None = None,
) -> Opened:
    """Load target and drafter; the number type of an earlier start is kept."""
    return open_with(load(spec, begun, on_download), spec, num_items)


def load(
    spec: Spec,
    begun: Begun | None,
    on_download: Callable[["Download"], None] | None = None,
) -> "Pair":
    """Load target, tokenizer and drafter as a job asks for them, or as it began with them."""
    from dspark_batch.models.pairs import drafter_for
    from dspark_batch.models.thinking import settle_thinking
    from dspark_batch.pair import load_pair, load_reading

    if begun and (setup := begun["setup"]):  # with some kernels their number decides bits
        blas.set_num_threads(setup["blas_threads"])
    if slow := blas.hint():
        log.warning("%s", slow)
    names = (spec.thinking, spec.family, spec.target, spec.drafter)
    if spec.thinking is not None:  # refused before gigabytes are fetched
        reading = load_reading(
            spec.family, target=spec.target, trust_remote_code=spec.trust_remote_code
        )
        settle_thinking(reading.tokenizer, *names)
    dtype = spec.dtype or (begun["identity"]["dtype"] if begun else None)
    drafts = spec.draft_length != 0
    return load_pair(
        spec.family,
        target=spec.target,
        drafter=drafter_for(spec.family, spec.target, spec.drafter, drafts=drafts),
        dtype=dtype,
        drafter_bits=None if spec.drafter_bits == "stored" else spec.drafter_bits,
        target_bits=spec.target_bits,
        trust_remote_code=spec.trust_remote_code,
        on_download=on_download,
    )


def _by_name(spec: Spec, pair: "Pair", thinking: str | None) -> Iterator[str]:
    """Say what nobody asked for, and follows from the names of target and drafter."""
    is_named = spec.drafter is not None or spec.draft_length == 0
    if spec.family is None and spec.target is not None and not is_named:
        found = pair.config.identity["drafter_source"]
        yield f"{found} is known for {spec.target}" if found else f"none is known for {spec.target}"
    if thinking == "on" and spec.thinking is None:
        yield "thinking on, as the drafter was trained"


def open_with(pair: "Pair", spec: Spec, num_items: int | None = None) -> Opened:
    """Open the engine half over a loaded pair, the way that suits this machine."""
    from dspark_batch.answers.who_drafts import with_look_ups
    from dspark_batch.engine.engine import Engine
    from dspark_batch.engine.setup import set_up
    from dspark_batch.models.thinking import settle_thinking

    if spec.lookup:
        pair = with_look_ups(pair)
    tokenizer = pair.reader
    thinking = settle_thinking(tokenizer, spec.thinking, spec.family, spec.target, spec.drafter)
    asked = number_or_none(spec.draft_length) if spec.score is None else 0
    setup = set_up(
        pair,
        slots=number_or_none(spec.slots),
        draft_length=asked,
        is_paced=spec.sampling != "rejection" and not spec.log_confidence,
        max_tokens=spec.max_tokens,
        num_items=num_items,
    )
    plan = setup.plan
    why = "; ".join([plan.why, *_by_name(spec, pair, thinking.choice)])
    setup = replace(setup, plan=replace(plan, why=why))
    engine = Engine(
        pair,
        slots=setup.plan.slots,
        draft_length=setup.plan.draft_length if spec.sampling == "rejection" else asked,
        confidence_threshold=spec.confidence_threshold,
        sampling=spec.sampling,
        log_confidence=spec.log_confidence,
        lookup=spec.lookup,
        shapes=setup.shapes,
        lengths=() if spec.log_confidence else setup.lengths,
        costs=setup.costs,
        most_positions=setup.most_positions,
        state_positions=setup.state_positions,
        prefix_positions=0 if spec.no_prefix_cache else setup.prefix_positions,
    )
    numerics = setup.conformance.numerics
    identity = pair.config.identity | {"thinking": thinking.choice, "numerics": numerics}
    return Opened(
        engine,
        thinking.render,
        pair.config.context_length,
        identity,
        setup.plan.slots,
        setup.to_json(),
        partial(_gauge, engine),
        thinking.split,
        partial(open_baseline, pair, setup, thinking.split),
        engine.leave_out,
        lambda: setup.keep_learnt(engine.costs),
        tokenizer.decode,
        [mark for mark in (tokenizer.think_start, tokenizer.think_end) if mark],
        pair.target.facts.vocab_size,
    )


def _gauge(engine: "Engine") -> Gauge:
    """Read the engine's gauge, without what a CPU cannot tell: whether it waits for itself."""
    from dspark_batch import device

    gauge = engine.gauge()
    return replace(gauge, idle_s=None) if device.is_cpu() else gauge


def open_baseline(
    pair: "Pair", setup: "Setup", split: Callable[[str], Said], against: Against = "engine"
) -> Baseline:
    """Set up plain decoding with a loaded pair: what an audit compares with.

    This is the one place that says what the baseline is: the same target, no drafts, nothing cached
    from other prompts.

    Args:
        pair: whose target answers.
        setup: of the run.
        split: tells reasoning and answer apart.
        against: our engine without a drafter, or mlx-lm's own generation.
    """
    from dspark_batch.baseline.margins import margins
    from dspark_batch.baseline.outside import generate_outside
    from dspark_batch.engine.engine import Engine

    generate: Callable[[Iterable[Request | Failure]], Iterator[Outcome]]
    if against == "mlx-lm":
        generate = partial(generate_outside, pair, setup.plan.slots)
    else:
        generate = Engine(
            pair,
            slots=setup.plan.slots,
            draft_length=0,
            shapes=setup.shapes,
            most_positions=setup.most_positions,
            state_positions=setup.state_positions,
            prefix_positions=0,
        ).generate

    def margin(request: Request, answer: Sequence[int], tokens: tuple[int, int]) -> Margin:
        return Margin(*margins(pair, request, answer, tokens))

    stop_ids, scores = pair.config.stop_ids, against == "engine"
    return Baseline(generate, pair.reader.decode, margin, stop_ids, split, scores)


def answer(
    spec: Spec,
    opened: Opened,
    fresh: Iterator[Request | Failure],
    admits: Callable[[Item], bool],
) -> Iterator[Outcome]:
    """Generate; an answer that has turns behind it goes back in with the next one.

    Args:
        spec: what items are asked, and how.
        opened: what answers.
        fresh: first turns, as `ask` makes them.
        admits: asked about each item before its first turn is generated; a no ends it all.
    """
    waiting: deque[Request | Failure] = deque()
    answers: dict[int, tuple[Completion, ...]] = {}  # Item.index -> to the turns so far

    def may_begin(item: Item) -> bool:
        return item.index in answers or admits(item)

    while True:
        for outcome in opened.engine.generate(_waiting_first(waiting, fresh), may_begin):
            item = outcome.item
            earlier = answers.pop(item.index, ())
            if isinstance(outcome, Failure):
                yield outcome
                continue
            said = split(spec, opened, outcome)
            if len(earlier) + 1 < num_turns(item.record, spec):
                answers[item.index] = (*earlier, said)
                waiting.append(ask(spec, opened, item, answers[item.index]))
            else:
                yield said._replace(earlier=earlier)
        if not waiting:  # else the stream had ended before these were there
            return


def split(spec: Spec, opened: Opened, completion: Completion) -> Completion:
    """Tell the reasoning from the answer; a text that is continued has none."""
    said = said_in(completion.text, completion.item.record, spec, opened.split)
    return completion._replace(text=said.answer, reasoning=said.reasoning)


def _waiting_first(
    waiting: deque[Request | Failure], fresh: Iterator[Request | Failure]
) -> Iterator[Request | Failure]:
    while True:
        request = waiting.popleft() if waiting else next(fresh, None)
        if request is None:
            return
        yield request


def ask(
    spec: Spec, opened: Opened, item: Item, earlier: tuple[Completion, ...] = ()
) -> Request | Failure:
    """Make the request of an item's next turn, behind the answers to earlier ones."""
    said = [turn.text for turn in earlier]
    return to_request(item, spec, opened.render, opened.context_length, said)
