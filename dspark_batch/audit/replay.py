"""What rows claim, compared with what a baseline answers to the same requests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

from dspark_batch.intake.mapping import Render, Split, said_in, to_request
from dspark_batch.record.formats import Manifest
from dspark_batch.record.rows import AnswerRow, LogprobsJson, of_answer, of_prompt
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Failure, Item, Outcome, Request, Said

T = TypeVar("T")

Verdict: TypeAlias = Literal["near-tie", "defect"]
Against: TypeAlias = Literal["engine", "mlx-lm"]


class Margin(NamedTuple):
    """How clear the target's choice of one token is; differences of logits, noise included."""

    top_2: float  # the likeliest token before the second
    spread: float  # the likeliest token before the less likely of the two that are compared


class Baseline(NamedTuple):
    """Decoding without a drafter: what an answer must be equal to."""

    generate: Callable[[Iterable[Request | Failure]], Iterator[Outcome]]  # in any order
    decode: Callable[[Sequence[int]], str]
    # For a request and the answer tokens before a position: the margin of two tokens there.
    margin: Callable[[Request, Sequence[int], tuple[int, int]], Margin]
    stop_ids: frozenset[int]  # end any answer
    split: Callable[[str], Said] = partial(Said, None)  # tells reasoning and answer apart
    scores: bool = True  # whether it tells log-probabilities


@dataclass(frozen=True, slots=True)
class Claim:
    """What a row says that one request was answered with."""

    request: Request
    text: str  # without the reasoning
    turn: int = 0  # which question of a conversation, from 0
    # Of an earlier turn a row keeps the text only; then all these are None.
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None
    reasoning: str | None = None
    logprobs: LogprobsJson | None = None
    prompt_logprobs: LogprobsJson | None = None
    parsed: bool | None = None  # whether a structure was met; None: nobody asked for one
    spec: Spec | None = None  # of the job: how the record's answer is split; None: as any other

    @property
    def is_whole(self) -> bool:
        """Whether the row keeps all of the answer, and not its text alone."""
        return self.token_ids is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first place at which a row and the baseline part."""

    where: str  # the record's file and line
    custom_id: str
    sample_index: int
    turn: int
    position: int | None  # answer token, from 0; None: it is not about one token
    row: str  # the token's text, or what else the row has there
    baseline: str
    row_token: int | None = None  # None: the row has none there
    baseline_token: int | None = None
    margin: float | None = None  # logit of the likeliest token minus that of the second
    spread: float | None = None  # ... minus that of the less likely of these two tokens
    verdict: Verdict = "defect"

    def __str__(self) -> str:
        name = f"{self.where} (custom_id {self.custom_id}, sample {self.sample_index})"
        turn = f" of turn {self.turn + 1}" if self.turn else ""
        at = "" if self.position is None else f" at answer token {self.position}"
        row = _token(self.row_token, self.row)
        baseline = _token(self.baseline_token, self.baseline)
        both = f"{row} in the row, {baseline} in the baseline"
        margin = "" if self.margin is None else f"; top-2 margin there {self.margin:.3g}"
        return f"{name}: {self.verdict}{at}{turn}: {both}{margin}"


def _token(token: int | None, text: str) -> str:
    return text if token is None else f"{token} {text!r}"


def claims_of(
    item: Item, row: AnswerRow, spec: Spec, render: Render, context_length: int
) -> list[Claim] | Failure:
    """List what a row with an answer claims, one claim for each turn.

    Each turn is asked behind the answers that the row has, so the claims stand alone.

    Returns:
        The claims; a Failure: a turn that has an answer cannot be asked at all.
    """
    earlier = tuple(row["earlier_answers"] or ())
    claims = []
    for turn in range(len(earlier) + 1):
        request = to_request(item, spec, render, context_length, earlier[:turn])
        if isinstance(request, Failure):
            return request
        if turn < len(earlier):
            claims.append(Claim(request, earlier[turn], turn, spec=spec))
        else:
            claims.append(_of_last_turn(request, row, turn, spec))
    return claims


def _of_last_turn(request: Request, row: AnswerRow, turn: int, spec: Spec) -> Claim:
    return Claim(
        request,
        row["completion"],
        turn,
        token_ids=tuple(row["token_ids"]),
        finish_reason=row["finish_reason"],
        reasoning=row["reasoning"],
        logprobs=row["logprobs"],
        prompt_logprobs=row["prompt_logprobs"],
        parsed=row["structure"] and row["structure"]["parsed"],
        spec=spec,
    )


def divergence_of(manifest: Manifest | None) -> float:
    """Look up how far logits lay from mlx-lm's own where the job ran; 0: nobody measured."""
    setup = manifest and manifest["setup"]
    return setup["divergence"] if setup else 0.0


@dataclass(slots=True)
class _Asked(Generic[T]):
    """An item whose claims are being compared."""

    key: T
    open_claims: int
    difference: Difference | None = None


def replay(
    baseline: Baseline, asked: Iterable[tuple[T, Sequence[Claim]]], divergence: float
) -> Iterator[tuple[T, Difference | None]]:
    """Answer requests again and compare, as lazily as the baseline pulls.

    Args:
        baseline: what must come out.
        asked: what names an item for the caller, and at least one claim of it.
        divergence: as `divergence_of` gives it.

    Yields:
        Each name once, with the difference in its earliest turn; None: all is equal.
    """
    claims: dict[int, tuple[_Asked[T], Claim]] = {}  # by number of the request

    def requests() -> Iterator[Request]:
        number = 0
        for key, of_item in asked:
            item = _Asked(key, len(of_item))
            for claim in of_item:
                claims[number] = item, claim
                # An index names a slot's answer; the noise does not come from it.
                renamed = claim.request.item._replace(index=number)
                yield replace(claim.request, item=renamed)
                number += 1

    for outcome in baseline.generate(requests()):
        item, claim = claims.pop(outcome.item.index)
        found = compare(claim, outcome, baseline, divergence)
        if found and (item.difference is None or found.turn < item.difference.turn):
            item.difference = found
        item.open_claims -= 1
        if not item.open_claims:
            yield item.key, item.difference


def compare(
    claim: Claim, outcome: Outcome, baseline: Baseline, divergence: float
) -> Difference | None:
    """Compare one answer with the baseline's; None: they are equal byte for byte."""
    if isinstance(outcome, Failure):
        return _difference(claim, None, "an answer", f"a failure ({outcome.message})")
    if claim.token_ids not in (None, outcome.token_ids):
        return _of_tokens(claim, claim.token_ids, outcome, baseline, divergence)
    said = _split(claim, outcome.text, baseline.split)
    if claim.text != said.answer:
        row, other = _where_texts_part(claim.text, said.answer)
        return _difference(claim, None, f"the text {row}", f"the text {other}")
    if claim.is_whole and claim.reasoning != said.reasoning:
        row, other = _where_texts_part(claim.reasoning, said.reasoning)
        return _difference(claim, None, f"the reasoning {row}", f"the reasoning {other}")
    if claim.finish_reason not in (None, outcome.finish_reason):
        reasons = (claim.finish_reason, outcome.finish_reason)
        return _difference(claim, None, *(f"finish_reason {reason}" for reason in reasons))
    parsed = outcome.structure and outcome.structure.parsed
    if claim.is_whole and claim.parsed != parsed:
        return _difference(claim, None, *(f"parsed {each}" for each in (claim.parsed, parsed)))
    if not (claim.is_whole and baseline.scores):
        return None
    prompts = claim.prompt_logprobs, of_prompt(outcome.prompt_logprobs)
    answers = claim.logprobs, of_answer(outcome.logprobs)
    return _of_logprobs(claim, *prompts, "prompt_logprobs") or _of_logprobs(
        claim, *answers, "logprobs"
    )


def _of_logprobs(
    claim: Claim, told: LogprobsJson | None, again: LogprobsJson | None, column: str
) -> Difference | None:
    """Compare log-probabilities, with a tolerance of nothing.

    A baseline over the same numerics computes the same bits, and both are rounded alike.
    """
    if told is None or again is None:
        if told is again:
            return None
        words = (f"{column} {'null' if each is None else 'not null'}" for each in (told, again))
        return _difference(claim, None, *words)
    for name, values in again.items():
        if (row := told.get(name)) == values:
            continue
        ours, others = (each if isinstance(each, list) else [each] for each in (row, values))
        at = first_difference(ours, others)
        found = (str(each[at]) if at < len(each) else "nothing" for each in (ours, others))
        return _difference(claim, None, *(f"{column}.{name}[{at}] {each}" for each in found))
    return None


def _split(claim: Claim, text: str, split: Split) -> Said:
    if claim.spec is None:
        return split(text)
    return said_in(text, claim.request.item.record, claim.spec, split)


def first_difference(a: Sequence[T], b: Sequence[T]) -> int:
    """Count the leading tokens, or characters, that two answers share."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def judge(spread: float, divergence: float) -> Verdict:
    """Tell what rounding can do from what it cannot.

    Both logits may be off by the divergence, in opposite directions.
    """
    return "near-tie" if spread <= 2 * divergence else "defect"


def text_of_token(decode: Callable[[Sequence[int]], str], token: int) -> str:
    """Decode one token, which a damaged row may have made up."""
    try:
        return decode([token])
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return "?"


def _of_tokens(
    claim: Claim,
    claimed: Sequence[int],
    outcome: Completion,
    baseline: Baseline,
    divergence: float,
) -> Difference:
    position = first_difference(claimed, outcome.token_ids)
    row, other = (
        ids[position] if position < len(ids) else None for ids in (claimed, outcome.token_ids)
    )
    texts = [
        "the end" if token is None else text_of_token(baseline.decode, token)
        for token in (row, other)
    ]
    found = _difference(claim, position, *texts)
    found = replace(found, row_token=row, baseline_token=other)
    if row is None or other is None:
        return found
    margin = baseline.margin(claim.request, outcome.token_ids[:position], (row, other))
    verdict = judge(margin.spread, divergence)
    return replace(found, margin=margin.top_2, spread=margin.spread, verdict=verdict)


def _difference(claim: Claim, position: int | None, row: str, baseline: str) -> Difference:
    item = claim.request.item
    return Difference(
        where=item.where,
        custom_id=item.custom_id,
        sample_index=item.sample_index,
        turn=claim.turn,
        position=position,
        row=row,
        baseline=baseline,
    )


def _where_texts_part(a: str | None, b: str | None) -> tuple[str, str]:
    """Quote two texts around the first character that differs; None: there is no text."""
    if a is None or b is None:
        return repr(a), repr(b)
    at = first_difference(a, b)
    begin = max(0, at - 10)
    return repr(a[begin : at + 20]), repr(b[begin : at + 20])
