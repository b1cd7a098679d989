"""What the user asked for: every option is a field here or does not exist."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

from dspark_batch.errors import UsageError
from dspark_batch.types import Sampling, SamplingRule

Dtype = Literal["float32", "bfloat16", "float16"]
Bits = Literal[2, 3, 4, 5, 6, 8]  # of a quantised weight
Resume = Literal["if-possible", "always", "never"]

OUTPUTS = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One job, resolved: where prompts come from, what answers them, where rows go."""

    inputs: tuple[str, ...]  # paths, globs, or "-" for JSONL on standard input
    out: str  # *.parquet or *.jsonl
    family: str | None = (
        None  # a name in the registry of pairs; None: "tiny" unless target is given
    )
    # Both: a directory, ORG/NAME or ORG/NAME@REVISION on the Hub; None: the family's.
    target: str | None = None
    drafter: str | None = None
    drafter_bits: Bits | Literal["auto", "stored"] = "auto"  # auto: 4 where that is faster
    target_bits: Bits | None = None  # None: as it is stored
    trust_remote_code: bool = False  # let a target run Python code of its own
    dtype: Dtype | None = None  # None: chosen by measurement at the first start
    system_prompt: str | None = None  # for every item that brings none of its own
    prompt_column: str = "prompt"
    messages_column: str = "messages"
    output_prefix: str = ""  # before each of our column names
    max_tokens: int = 512  # most tokens of an answer, a stop token included
    temperature: float = 0.0  # this and the next five: what `types.Sampling` says
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    sampling: SamplingRule = "coupled"  # both rules are exact; see numerics/rules.py
    slots: int = 1  # sequences that decode together
    draft_length: int | None = (
        None  # drafts per round; None: the drafter's block; 0: plain decoding
    )
    confidence_threshold: float = 0.0  # verify a block up to its first draft below this; 0: all
    log_confidence: bool = False  # metrics tell each verified draft's, for `calibrate`
    resume: Resume = "if-possible"
    overwrite: bool = False  # discard what the run directory holds
    retry_failed: bool = False  # run items again whose last row failed
    limit: int | None = None  # only the first N records
    fsync_every: int = 1  # rows per fsync of the journal
    grace: float = 30.0  # seconds that a first Ctrl-C leaves to what is in flight

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UsageError("no input: name at least one file, or - for standard input.")
        if PurePath(self.out).suffix not in OUTPUTS:
            raise UsageError(
                f"{self.out}: expected an output that ends in {' or '.join(OUTPUTS)}; rename it."
            )
        _must_be_text(self.system_prompt, self.prompt_column, self.messages_column, *self.stop)
        _must_be_text(self.output_prefix)
        if self.resume not in get_args(Resume):
            raise UsageError(f"resume is {self.resume}, expected one of {get_args(Resume)}.")
        if self.overwrite and self.resume == "always":
            raise UsageError("overwrite and resume=always exclude each other; drop one of them.")
        _one_of("drafter_bits", self.drafter_bits, (*get_args(Bits), "auto", "stored"))
        _one_of("target_bits", self.target_bits, (*get_args(Bits), None))
        _at_least(1, max_tokens=self.max_tokens, slots=self.slots, fsync_every=self.fsync_every)
        _at_least(1, limit=self.limit)
        _at_least(0, draft_length=self.draft_length, grace=self.grace)
        if not 0 <= self.confidence_threshold <= 1:
            raise UsageError(
                f"confidence_threshold is {self.confidence_threshold}, expected 0 to 1."
            )
        if self.sampling not in get_args(SamplingRule):
            raise UsageError(f"sampling is {self.sampling}, expected {get_args(SamplingRule)}.")
        try:
            self.sampling_of_all()
        except ValueError as error:
            raise UsageError(f"{error}.") from error

    def sampling_of_all(self) -> Sampling:
        """Say how an item is drawn that chooses nothing for itself."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
        )


def _must_be_text(*texts: str | None) -> None:
    """Refuse what a shell passed on although it is no UTF-8."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{text!r} is not UTF-8; give it as text.") from error


def _one_of(name: str, value: int | str | None, known: tuple[int | str | None, ...]) -> None:
    if value not in known or isinstance(value, bool):
        words = ", ".join(str(each) for each in known if each is not None)
        raise UsageError(f"{name} is {value}, expected one of {words}.")


def _at_least(least: int, **numbers: float | None) -> None:
    """Refuse a number that is below `least`; None stands for a default and passes."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise UsageError(f"{name} is {number}, expected {least} or more.")
