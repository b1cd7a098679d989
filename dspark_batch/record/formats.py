"""What the files of a run directory hold: `manifest.json`, `report.json` and `audit.json`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

from dspark_batch.types import PlanJson, SetupJson, WorkerJson


class InputJson(TypedDict):
    """An input file, as a start found it."""

    path: str  # as typed
    bytes: int
    sha256: str
    records: int


class FingerprintJson(TypedDict):
    """Everything that can change a row."""

    sha256: str  # of the fields, as JSON with sorted keys
    fields: Mapping[str, Any]  # of the spec and of the models, by name


class Begun(TypedDict):
    """With what a job began to compute, and goes on."""

    fingerprint: FingerprintJson
    identity: Mapping[str, str | None]  # of the models: what they are, and where they came from
    setup: SetupJson | None  # None: nobody planned


class Manifest(Begun):
    """A job before its first token."""

    version: int
    run_id: str  # seeds the journal
    created: str  # ISO 8601
    spec: Mapping[str, Any]  # the fields of the `Spec`, which checks them
    inputs: Sequence[InputJson]
    versions: Mapping[str, str]  # package -> version
    platform: Mapping[str, str]
    ignored: NotRequired[Mapping[str, int]]  # field that is left aside -> records that have it
    shards: NotRequired[Sequence[str]]  # the run_id of each that was merged, in order
    sha256: NotRequired[str]  # of all else that is in it; it is there once it is written


class TellingPlan(PlanJson):
    """A plan, and how its passes compute."""

    dtype: str
    step_shape: str


class ReportJson(TypedDict):
    """The fields of a `Report`; what they mean is said there."""

    out: str
    total: int
    succeeded: int
    errored: int
    skipped: int
    resumed: int
    prompt_tokens: int
    completion_tokens: int
    new_tokens: int
    rounds: int
    accepted: int
    drafted: int
    looked_up: int
    mean_acceptance_length: float | None
    errors_by_code: Mapping[str, int]
    first_errors: Sequence[str]
    input_notes: Mapping[str, int]
    samples: int
    verified: int
    mismatched: int
    load_s: float
    decode_s: float
    prefill_s: float | None
    round_s: float | None
    draft_s: float | None
    verify_s: float | None
    idle_s: float | None
    audit_s: float | None
    finish_s: float
    peak_memory_bytes: int | None
    workers: Sequence[WorkerJson]
    plan: TellingPlan | None


class SavedReport(TypedDict):
    """The file `report.json`."""

    report: ReportJson
    inputs: Sequence[InputJson]  # of which the output was written


Verdict: TypeAlias = Literal["damaged", "different", "near-ties only", "equal"]


class FindingJson(TypedDict):
    """Something that an audit found; a difference has the fields of a `Difference` besides."""

    says: str  # for people
    kind: NotRequired[str]  # which step found it


class AuditJson(TypedDict):
    """The fields of an `Audit`; what they mean is said there."""

    out: str
    against: str
    strict: bool
    rows: int
    answers: int
    replayed: int
    left_out: Mapping[str, int]
    looked_at: Mapping[str, int]
    wrong: Mapping[str, int]
    findings: Sequence[FindingJson]
    differences: Sequence[FindingJson]
    seconds: float
    verdict: Verdict
