"""Compare two runs of the same input: another version, drafter or machine."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from dspark_batch.audit.replay import (
    Baseline,
    Claim,
    claims_of,
    divergence_of,
    first_difference,
    judge,
    text_of_token,
)
from dspark_batch.errors import EqualityError, UsageError
from dspark_batch.opening import Opened, OpenEngine, open_pair
from dspark_batch.output.finish import Rows
from dspark_batch.output.look import Look, look
from dspark_batch.record.rows import AnswerRow, Row
from dspark_batch.record.run_dir import differences, run_dir_of
from dspark_batch.types import Failure, Item

Relation: TypeAlias = Literal["same", "tied", "different", "only in A", "only in B"]
_Key: TypeAlias = tuple[str, str, int]  # custom_id, digest of the record, sample index


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """An item that is not the same in both runs."""

    where: str  # the record's file and line
    custom_id: str
    sample_index: int
    relation: Relation
    position: int | None = None  # first answer token that differs; None: it is not about a token
    a: str  # the token there, or what else there is
    b: str
    margin: float | None = None  # of A's target there: the likeliest token before the second
    spread: float | None = None  # ... before the less likely of the two


@dataclass(slots=True, kw_only=True)
class Diff:
    """Two runs side by side."""

    a: str
    b: str
    settings: list[str]  # that differ, and can change a row
    are_finished: bool  # both: then an item that only one has is a difference
    counts: Counter[Relation] = field(default_factory=Counter)
    items: list[Compared] = field(default_factory=list)  # that are not the same

    @property
    def in_one_only(self) -> int:
        """Items that have a row in one run only."""
        return self.counts["only in A"] + self.counts["only in B"]

    @property
    def exit_code(self) -> int:
        """0: the same, or tied; 3: really different."""
        is_different = self.counts["different"] or (self.are_finished and self.in_one_only)
        return EqualityError.exit_code if is_different else 0


def diff(
    a: str, b: str, *, trust_remote_code: bool = False, open_engine: OpenEngine = open_pair
) -> Diff:
    """Compare the answers of two runs item by item; `metrics` and `verified` have no part in it.

    Items are matched by id, content and sample, so order and place may differ. Only if answers
    differ is the pair of A loaded, to measure how clear its target's choice was where they part.

    Args:
        a: output or run directory of a run; finished or not, and so is the other.
        b: of another.
        trust_remote_code: let the target of A run Python code of its own.
        open_engine: loads the pair of A.

    Raises:
        UsageError: one of them is no run.
        ModelError: answers differ and the pair of A cannot be loaded.
    """
    first, second = (
        look(str(run_dir_of(name).out), trust_remote_code=trust_remote_code) for name in (a, b)
    )
    found = Diff(
        a=first.spec.out,
        b=second.spec.out,
        settings=_settings(first, second),
        are_finished=first.run_dir.has_output() and second.run_dir.has_output(),
    )
    with first.rows() as mine, second.rows() as others:
        pairs = _Judge(first, second, open_engine)
        for compared in _compared(mine, others, pairs):
            found.counts[compared.relation] += 1
            if compared.relation != "same":
                found.items.append(compared)
    return found


def _settings(a: Look, b: Look) -> list[str]:
    mine, others = (each.manifest["fingerprint"]["fields"] for each in (a, b))
    return differences(a.manifest, {**dict.fromkeys(mine), **others}, ("in A", "in B"))


def _compared(mine: Rows, others: Rows, judge_of: "_Judge") -> Iterator[Compared]:
    """Walk A, and then what is left of B."""
    by_key: defaultdict[_Key, list[int]] = defaultdict(list)
    for item, _ in others.answered():
        by_key[_key(item)].append(item.index)
    for item, entry in mine.answered():
        places = by_key[_key(item)]
        if not places:
            yield _alone(item, "only in A")
            continue
        yield judge_of.compared(item, entry.row, others.at(places.pop(0)).row)
    left = {place for places in by_key.values() for place in places}
    yield from (_alone(item, "only in B") for item, _ in others.answered() if item.index in left)


def _key(item: Item) -> _Key:
    return item.custom_id, item.digest, item.sample_index


def _alone(item: Item, relation: Relation) -> Compared:
    texts = ("a row", "none") if relation == "only in A" else ("none", "a row")
    return _found(item, relation, *texts)


def _found(item: Item, relation: Relation, a: str, b: str) -> Compared:
    return Compared(
        where=item.where,
        custom_id=item.custom_id,
        sample_index=item.sample_index,
        relation=relation,
        a=a,
        b=b,
    )


class _Judge:
    """Tells tied from really different; loads the pair of A when it is first needed."""

    def __init__(self, a: Look, b: Look, open_engine: OpenEngine) -> None:
        self._job = a
        self._divergence = max(divergence_of(a.manifest), divergence_of(b.manifest))
        self._open_engine = open_engine
        self._loaded: tuple[Opened, Baseline] | None = None

    def compared(self, item: Item, a: Row, b: Row) -> Compared:
        if _said(a) == _said(b):
            return _found(item, "same", "", "")
        if a["status"] != "succeeded" or b["status"] != "succeeded":
            return _found(item, "different", _outcome(a), _outcome(b))
        found = _found(item, "different", "an answer", "another")
        if a["earlier_answers"] != b["earlier_answers"]:
            return replace(found, a="an earlier answer", b="another")
        position = first_difference(a["token_ids"], b["token_ids"])
        mine, other = (
            row["token_ids"][position] if position < len(row["token_ids"]) else None
            for row in (a, b)
        )
        if mine is None and other is None:
            return replace(found, a=f"{a['finish_reason']} or text", b="another")
        return self._at(replace(found, position=position), item, a, (mine, other))

    def _at(
        self, found: Compared, item: Item, row: AnswerRow, tokens: tuple[int | None, int | None]
    ) -> Compared:
        """Describe two tokens, and measure the choice between them."""
        opened, baseline = self._pair()
        spec = self._job.spec
        a, b = (
            "the end" if t is None else f"{t} {text_of_token(baseline.decode, t)!r}" for t in tokens
        )
        found = replace(found, a=a, b=b)
        claims = claims_of(item, row, spec, opened.render, opened.context_length)
        mine, other = tokens
        if isinstance(claims, Failure) or mine is None or other is None:
            return found
        if not self._is_replayable(claims[-1]):
            return found
        before = row["token_ids"][: found.position]
        margin = baseline.margin(claims[-1].request, before, (mine, other))
        is_tied = judge(margin.spread, self._divergence) == "near-tie"
        relation: Relation = "tied" if is_tied else "different"
        return replace(found, relation=relation, margin=margin.top_2, spread=margin.spread)

    def _is_replayable(self, claim: Claim) -> bool:
        return self._job.spec.sampling == "coupled" or claim.request.sampling.is_greedy

    def _pair(self) -> tuple[Opened, Baseline]:
        if self._loaded is None:
            opened = self._open_engine(self._job.spec, self._job.manifest)
            if opened.baseline is None:
                raise UsageError("diff: this engine has no baseline to measure with.")
            self._loaded = opened, opened.baseline("engine")
        return self._loaded


def _said(row: Row) -> tuple[object, ...]:
    """Give what a row answers; the message of a failure names files, so its code counts."""
    if row["status"] != "succeeded":
        return row["status"], row["error"]["code"]
    answer = (row["completion"], row["earlier_answers"], row["finish_reason"])
    return *answer, row["token_ids"], row["reasoning"]


def _outcome(row: Row) -> str:
    if row["status"] == "succeeded":
        return "an answer"
    return f"{row['status']}: {row['error']['code']}"
