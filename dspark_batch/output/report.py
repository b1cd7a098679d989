"""Numbers about a run: while it goes, and when it is over."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, cast

from dspark_batch.errors import EqualityError
from dspark_batch.record.formats import ReportJson, TellingPlan
from dspark_batch.record.rows import Row, committed_in, ratio
from dspark_batch.types import Completion, Failure, Gauge, Outcome, WorkerJson

Stage = Literal["load", "decode", "finish"]

_FIRST_ERRORS = 3


# Fields of a report that its rows alone decide.
COUNTS = (
    *("total", "succeeded", "errored", "skipped"),
    *("prompt_tokens", "completion_tokens", "rounds", "accepted", "drafted"),
    *("looked_up", "verified", "mismatched"),
)


@dataclass(frozen=True, slots=True)
class Tick:
    """Where a run stands: one at the start of each stage, and one for each row."""

    stage: Stage
    total: int  # records of the job
    done: int  # rows in the journal, those of earlier starts included
    failed: int  # of these, how many are failures; what the job says to skip is none
    resumed: int  # rows that earlier starts left
    new_tokens: int = 0  # completion tokens that this start generated
    outcome: Outcome | None = None  # what was just appended; None: a stage begins
    # What a long stage is at, for people, and behind a comma how far; "": nothing to tell.
    doing: str = ""
    gauge: Gauge | None = None  # of the engine; None: it has none
    audit_s: float | None = None  # spent on decoding items again; None: not asked for

    def after(self, outcome: Outcome, gauge: Gauge | None = None) -> "Tick":
        """Count one more row."""
        tokens = outcome.num_generated if isinstance(outcome, Completion) else 0
        return replace(
            self,
            done=self.done + 1,
            failed=self.failed + (isinstance(outcome, Failure) and not outcome.is_skipped),
            new_tokens=self.new_tokens + tokens,
            outcome=outcome,
            gauge=gauge,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A finished run. Counts are about all rows of the output, times about the last start."""

    out: str
    total: int  # rows
    succeeded: int
    errored: int
    skipped: int
    resumed: int  # rows that earlier starts left
    prompt_tokens: int
    completion_tokens: int
    new_tokens: int  # completion tokens that this start generated
    rounds: int  # this and the next three: of an item's last turn
    accepted: int  # draft tokens
    drafted: int  # draft tokens that the target verified
    looked_up: int = 0  # of the accepted ones, those out of prompt or answer
    mean_acceptance_length: float | None  # tokens per round, bonus included; None: no rounds
    errors_by_code: Mapping[str, int]  # error.code -> rows, the most frequent first
    first_errors: Sequence[str]  # messages of the first few failures, in input order
    # What rows note of their records -> rows: what was odd, and what was ignored.
    input_notes: Mapping[str, int] = field(default_factory=dict)
    samples: int = 1  # rows per record
    verified: int = 0  # answers that were seen to be those of plain decoding
    mismatched: int = 0  # answers that were seen not to be
    load_s: float = 0.0
    decode_s: float = 0.0
    prefill_s: float | None = None  # of decode_s; None: not measured
    round_s: float | None = None  # of decode_s; what is left is the host's
    # Of round_s, by samples of it; None: too few rounds for one.
    draft_s: float | None = None
    verify_s: float | None = None
    # Of these two at most: the device had nothing to do; None: not measured, or it is a CPU.
    idle_s: float | None = None
    audit_s: float | None = None  # of decode_s, decoding items again; None: not asked for
    finish_s: float = 0.0
    peak_memory_bytes: int | None = None  # that MLX held; None: not measured
    workers: Sequence[WorkerJson] = ()  # of a fleet, in the last start; (): there was none
    plan: TellingPlan | None = None  # how items were decoded; None: nobody planned

    @property
    def exit_code(self) -> int:
        """0: every row is an answer, or skipped as the job says; 1: there are failure rows.

        3: an answer is not what plain decoding gives.
        """
        if self.mismatched:
            return EqualityError.exit_code
        return 1 if self.errored else 0

    @property
    def idle_share(self) -> float | None:
        """The share of the device's time in which it waited for the host, at most."""
        if self.idle_s is None or self.prefill_s is None or self.round_s is None:
            return None
        return ratio(self.idle_s, self.prefill_s + self.round_s)

    def decode_parts(self) -> dict[str, float]:
        """Split decode_s by what took it, in seconds, as far as it was measured."""
        audit_s = self.audit_s or 0.0
        if self.prefill_s is None or self.round_s is None:
            return {"decoding": self.decode_s - audit_s, "audit": audit_s}
        rounds = {"draft and verify": self.round_s}
        if not self.drafted:
            rounds = {"decoding": self.round_s}
        elif self.draft_s is not None and self.verify_s is not None:
            rounds = {"draft": self.draft_s, "verify": self.verify_s}
        host_s = max(0.0, self.decode_s - audit_s - self.prefill_s - self.round_s)
        return {"prefill": self.prefill_s, **rounds, "host": host_s, "audit": audit_s}

    @classmethod
    def of_rows(cls, rows: Iterable[Row], **known: Any) -> Self:
        """Count the rows of an output; `known` are the fields that no row can tell."""
        counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        committed = 0  # by rounds
        codes: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        first_errors: list[str] = []
        for row in rows:
            counts["total"] += 1
            counts[row["status"]] += 1
            notes.update(row["input_notes"] or ())
            if row["status"] == "succeeded":
                usage, speed = row["usage"], row["metrics"]["speculative_decoding"]
                counts["prompt_tokens"] += usage["prompt_tokens"]
                counts["completion_tokens"] += usage["completion_tokens"]
                counts["rounds"] += speed["num_spec_steps"]
                counts["accepted"] += speed["num_accepted_draft_tokens"]
                counts["drafted"] += speed["num_draft_tokens"]
                # A row of an earlier version does not say.
                counts["looked_up"] += speed.get("num_accepted_lookup_tokens") or 0
                committed += committed_in(row)
                counts["verified"] += row["verified"] is True
                counts["mismatched"] += row["verified"] is False
            elif row["status"] == "errored":
                codes[row["error"]["code"]] += 1
                if len(first_errors) < _FIRST_ERRORS:
                    first_errors.append(row["error"]["message"])
        mean = ratio(committed, counts["rounds"])
        return cls(
            **counts,
            mean_acceptance_length=mean,
            errors_by_code=dict(codes.most_common()),
            first_errors=first_errors,
            input_notes=dict(notes.most_common()),
            **known,
        )

    def to_json(self) -> ReportJson:
        """Give the fields as they stand in report.json."""
        return cast("ReportJson", asdict(self))  # a test compares the fields
