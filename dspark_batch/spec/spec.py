"""What the user asked for: every option is a field here or does not exist."""

import json
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

from dspark_batch.errors import UsageError
from dspark_batch.spec.budget import seconds_of, seconds_until
from dspark_batch.spec.nearest import nearest
from dspark_batch.spec.shard import Shard, read_shard
from dspark_batch.spec.share import share_of
from dspark_batch.spec.structure import KINDS, structure_of
from dspark_batch.spec.where import Holds, Where, any_of, read_retry
from dspark_batch.types import Sampling, SamplingRule, Structure

Dtype = Literal["float32", "bfloat16", "float16"]
Bits = Literal[2, 3, 4, 5, 6, 8]  # of a quantised weight
DrafterBits = Literal["auto", "stored", Bits]
Resume = Literal["if-possible", "always", "never"]
Auto = Literal["auto"]
Overflow = Literal["error", "skip", "truncate-left", "truncate-right"]
Format = Literal["rows", "openai"]
Thinking = Literal["on", "off"]
LastAssistant = Literal["drop", "continue", "refuse"]
Regenerate = Literal["last", "all"]
SpecialTokens = Literal["as-text", "as-tokens"]

OUTPUTS = (".jsonl", ".parquet")
STDOUT = "-"  # as an output
MOST_SLOTS = 1024  # more than any machine has room and use for
_OF_GENERATING = (  # without a meaning where an answer is scored
    *("samples", "regenerate", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "frequency_penalty", "presence_penalty", "repetition_penalty", "bad_words"),
    *("min_tokens", "ignore_eos", "sampling", "draft_length", "confidence_threshold"),
    *("log_confidence", "lookup", "verify_greedy", "json_schema", "regex", "grammar", "choice"),
)
_ONE_SLASH = re.compile(r"(s3|s3a|gs|gcs|az|abfs|abfss|hf|https?|ftp|file):/(?!/)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One job, resolved: where prompts come from, what answers them, where rows go."""

    inputs: tuple[str, ...]  # paths, globs, or "-" for JSONL on standard input
    out: str  # *.parquet or *.jsonl, or "-" for JSONL on standard output as answers finish
    family: str | None = (
        None  # a name in the registry of pairs; None: "tiny" unless target is given
    )
    # Both: a directory, ORG/NAME or ORG/NAME@REVISION on the Hub; None: the family's.
    target: str | None = None
    drafter: str | None = None
    drafter_bits: DrafterBits = "auto"  # auto: 4 where that is faster
    target_bits: Bits | None = None  # None: as it is stored
    trust_remote_code: bool = False  # let a target run Python code of its own
    dtype: Dtype | None = None  # None: chosen by measurement at the first start
    system_prompt: str | None = None  # for every item that brings none of its own
    thinking: Thinking | None = None  # before an answer; None: the family's, else the template's
    system_column: str | None = None  # holds a record's own system prompt; None: no column does
    # What is asked; None: `prompt`, `messages` or another known shape, whichever a record has.
    prompt_column: str | None = None
    messages_column: str | None = None
    last_assistant: LastAssistant = "refuse"  # what becomes of an assistant turn at the end
    regenerate: Regenerate | None = None  # answers of a conversation that are made again
    ignore_fields: tuple[str, ...] = ()  # of a record, that are left aside instead of refused
    special_tokens: SpecialTokens = "as-text"  # what names of control tokens are inside data
    template: str | None = None  # Jinja over the columns: what it renders is the prompt
    on_overflow: Overflow = "error"  # what becomes of a prompt that leaves no room for an answer
    id_column: str | None = None  # names the records; None: `custom_id`, else `id`
    samples: int = 1  # rows per record
    keep: tuple[str, ...] = ()  # the only input columns of the output; (): all
    drop: tuple[str, ...] = ()  # input columns that the output has not
    output_column: str | None = None  # ours for the completion; None: output_prefix + "completion"
    output_prefix: str = ""  # before each of our other column names
    format: Format = "rows"  # what the output looks like; openai: that of their Batch API
    max_tokens: int = 512  # most tokens of an answer, a stop token included
    temperature: float = 0.0  # this and the next thirteen: what `types.Sampling` says
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    # Input column with the answer to score instead of one that is generated; None: generate.
    score: str | None = None
    # What an answer must look like; one of the four at most.
    json_schema: str | None = None  # its text
    regex: str | None = None  # of the whole answer
    grammar: str | None = None  # Lark's, its text
    choice: tuple[str, ...] = ()  # the answer is one of these
    sampling: SamplingRule = "coupled"  # both rules are exact; see numerics/rules.py
    slots: int | Auto = "auto"  # sequences that decode together; auto: what pays here
    draft_length: int | Auto = "auto"  # drafts per round; auto: what pays here; 0: plain decoding
    lookup: bool = False  # draft what prompt and answer say, where it is likelier to be right
    no_prefix_cache: bool = False  # compute every prompt whole, also where several begin alike
    confidence_threshold: float = 0.0  # verify a block up to its first draft below this; 0: all
    log_confidence: bool = False  # metrics tell each verified draft's, for `calibrate`
    resume: Resume = "if-possible"
    overwrite: bool = False  # discard what the run directory holds
    retry_failed: bool = False  # the same as retry_where = ("status=errored",)
    retry_where: tuple[str, ...] = ()  # run failures again for which one of these holds
    limit: int | None = None  # only the first N records
    shard: str | None = None  # only a part of these, "3/16": the third of 16; None: all
    fsync_every: int = 1  # rows per fsync of the journal
    grace: float = 30.0  # seconds that a first Ctrl-C leaves to what is in flight
    deadline: str | None = None  # local time of the day by which a start ends, "07:00"
    max_runtime: str | None = None  # how long a start may take, "6h", "1h30m"
    # Items that the baseline decodes again: "all" or true, or a share, "1%" or 0.01; None: none.
    verify_greedy: str | float | bool | None = None
    max_mismatches: int = 1  # answers that are not the baseline's, at which a start stops
    # Processes with a pair each; auto: one for each GPU. None: this process alone, unless ray is
    # given, which means auto.
    workers: int | Auto | None = None
    ray: str | None = None  # a running cluster, HOST:PORT or auto; None: workers on this machine
    # What a worker takes of a cluster, as JSON, '{"mlx": 1}'; None: a GPU, or else a CPU.
    worker_resources: str | None = None
    report_by: str | None = None  # input column whose values the report compares; None: none

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UsageError("no input: name at least one file, or - for standard input.")
        _must_be_output(self.out)
        _must_be_text(self.system_prompt, self.prompt_column, self.messages_column, *self.stop)
        _must_be_text(*self.bad_words, *self.choice, self.json_schema, self.regex, self.grammar)
        _must_be_text(self.id_column, self.system_column, *self.ignore_fields)
        _must_be_text(self.output_prefix, self.output_column, self.template, *self.keep, *self.drop)
        if self.overwrite and self.resume == "always":
            raise UsageError("overwrite and resume=always exclude each other; drop one of them.")
        self.retries()
        self._check_shard()
        _one_of(DrafterBits, drafter_bits=self.drafter_bits)
        _one_of(Bits, target_bits=self.target_bits)
        _at_least(1, max_tokens=self.max_tokens, fsync_every=self.fsync_every)
        _number_or_auto(slots=self.slots, draft_length=self.draft_length)
        _at_least(1, slots=number_or_none(self.slots))
        if (number_or_none(self.slots) or 1) > MOST_SLOTS:
            raise UsageError(f"slots is {self.slots}, expected 1 to {MOST_SLOTS}, or auto.")
        _at_least(1, limit=self.limit, samples=self.samples, max_mismatches=self.max_mismatches)
        _at_least(0, draft_length=number_or_none(self.draft_length), grace=self.grace)
        if not 0 <= self.confidence_threshold <= 1:
            raise UsageError(
                f"confidence_threshold is {self.confidence_threshold}, expected 0 to 1."
            )
        self._check_sampling()
        self._check_lookup()
        self._check_choices()
        self._check_audit()
        self._check_output()
        self._check_time()
        self._check_workers()
        self._check_score()

    def _check_score(self) -> None:
        if self.score is None:
            return
        _must_be_text(self.score)
        for name in _OF_GENERATING:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(
                    f"{name} is about answers that are generated, and score generates none; drop "
                    "one of them."
                )
        if self.on_overflow.startswith("truncate"):
            raise UsageError(
                f"on_overflow is {self.on_overflow}, but score cuts no prompt, expected error or "
                "skip."
            )

    def _check_shard(self) -> None:
        if self.part is not None and self.out == STDOUT:
            raise UsageError("-o - keeps nothing to merge; name a file for shard, or drop it.")

    def _check_sampling(self) -> None:
        try:
            self.sampling_of_all()
        except ValueError as error:
            raise UsageError(f"{error}.") from error
        if self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens is {self.min_tokens}, expected at most max_tokens, {self.max_tokens}."
            )

    def _check_lookup(self) -> None:
        if self.lookup and self.draft_length == 0:
            raise UsageError("lookup drafts, and draft_length 0 decodes plainly; drop one of them.")
        if self.lookup and self.sampling == "rejection":
            raise UsageError(
                "lookup changes no answer, but by the rejection rule every draft may; use sampling "
                "coupled, or drop lookup."
            )
        if self.lookup and self.log_confidence:
            raise UsageError(
                "log_confidence is about the drafter's drafts, and lookup puts others in their "
                "place; drop one of them."
            )

    def _check_choices(self) -> None:
        _one_of(Dtype, dtype=self.dtype)
        _one_of(Resume, resume=self.resume)
        _one_of(SamplingRule, sampling=self.sampling)
        _one_of(Overflow, on_overflow=self.on_overflow)
        _one_of(Format, format=self.format)
        _one_of(Thinking, thinking=self.thinking)
        _one_of(LastAssistant, last_assistant=self.last_assistant)
        _one_of(Regenerate, regenerate=self.regenerate)
        _one_of(SpecialTokens, special_tokens=self.special_tokens)

    def _check_audit(self) -> None:
        try:
            share = self.audited_share
        except ValueError as error:
            raise UsageError(
                f"verify_greedy is {self.verify_greedy}, expected all, or a share such as 1% or "
                "0.01; give it as --verify-greedy=1%."
            ) from error
        if share and self.sampling == "rejection" and not self.sampling_of_all().is_greedy:
            raise UsageError(
                "verify_greedy compares with decoding without drafts, but by the rejection rule an "
                "answer depends on them; use --sampling coupled."
            )

    def _check_output(self) -> None:
        if self.keep and self.drop:
            raise UsageError("keep and drop exclude each other; name the columns in one of them.")
        if self.out == STDOUT and self.resume == "always":
            raise UsageError("-o - keeps nothing to resume; drop resume=always, or name a file.")
        if self.format == "openai" and not self.out.endswith((STDOUT, ".jsonl")):
            raise UsageError(f"{self.out}: format openai is written to .jsonl only; rename it.")
        if self.format == "openai":
            self._refuse_with_openai()
        if self.regenerate is not None:
            self._refuse_with_regenerate()

    def _refuse_with_regenerate(self) -> None:
        if self.template is not None:
            raise UsageError("regenerate is about conversations, and a template is none; drop one.")
        if self.format == "openai":
            raise UsageError("regenerate writes conversations back, which format openai cannot.")
        if self.last_assistant == "continue":
            raise UsageError("regenerate makes the last answer again; drop last_assistant.")

    def _refuse_with_openai(self) -> None:
        if self.samples > 1:
            raise UsageError(
                f"samples is {self.samples}, but format openai has one answer per request; use "
                "format rows."
            )
        for name in ("keep", "drop", "output_column", "output_prefix"):
            if getattr(self, name):
                raise UsageError(f"{name} is about columns, which format openai has not; drop it.")

    def _check_time(self) -> None:
        if self.deadline is not None:
            seconds_until(self.deadline, now=0.0)
        if self.max_runtime is not None:
            seconds_of(self.max_runtime)

    def _check_workers(self) -> None:
        if self.workers is not None:
            _number_or_auto(workers=self.workers)
            _at_least(1, workers=number_or_none(self.workers))
        if self.worker_resources is None:
            return
        if self.ray is None:
            raise UsageError(
                "worker_resources is about a running cluster; name it with ray, or drop this."
            )
        resources_of(self.worker_resources)

    @property
    def is_fleet(self) -> bool:
        """Whether workers answer, and not this process."""
        return self.ray is not None or self.workers not in (None, 1)

    @property
    def prompt_name(self) -> str:
        """The column of a prompt."""
        return self.prompt_column or "prompt"

    @property
    def messages_name(self) -> str:
        """The column of a conversation."""
        return self.messages_column or "messages"

    @property
    def model_name(self) -> str:
        """What answers, as the user named it."""
        return self.target or self.family or "tiny"

    @property
    def part(self) -> Shard | None:
        """Which part of the records is meant; None: all."""
        return None if self.shard is None else read_shard(self.shard)

    def limited(self, num_records: int) -> range:
        """Say which of the records all shards have together."""
        return range(num_records if self.limit is None else min(num_records, self.limit))

    def part_of(self, num_records: int) -> range:
        """Say which of the records the job has.

        Raises:
            UsageError: there are fewer than shards.
        """
        whole = self.limited(num_records)
        return whole if self.part is None else self.part.part_of(len(whole))

    @property
    def audited_share(self) -> float:
        """The share of the items that the baseline decodes again, 0..1."""
        return share_of(self.verify_greedy)

    def retries(self) -> Holds:
        """Say which failures of earlier starts run again."""
        failed = [Where("status", "errored")] if self.retry_failed else []
        return any_of([*failed, *map(read_retry, self.retry_where)])

    def structure(self) -> Structure | None:
        """Read what every answer must look like; None: whatever it likes.

        Raises:
            ValueError: what is wrong with it.
        """
        given = {name: getattr(self, name) for name in KINDS}
        asked = [(name, value) for name, value in given.items() if value not in (None, ())]
        if not asked:
            return None
        if len(asked) > 1:
            raise ValueError(f"{asked[0][0]} and {asked[1][0]} exclude each other; drop one")
        (kind, value), *_ = asked
        try:
            return structure_of(kind, value)
        except ValueError as error:
            raise ValueError(f"{kind} {error}") from error

    def sampling_of_all(self) -> Sampling:
        """Say how an item is drawn that chooses nothing for itself."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            bad_words=self.bad_words,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            structure=self.structure(),
        )


def resources_of(text: str) -> dict[str, float]:
    """Read what a worker takes of a cluster, by name of the resource.

    Raises:
        UsageError: it is something else.
    """
    try:
        named = json.loads(text)
        if named and all(float(amount) > 0 for amount in named.values()):
            return {name: float(amount) for name, amount in named.items()}
    except (ValueError, TypeError, AttributeError):
        pass
    raise UsageError(
        f"worker_resources is {text}, expected names with an amount above 0, such as "
        """'{"mlx": 1}'."""
    )


def number_or_none(value: int | Auto) -> int | None:
    """Read a setting that may be left to the program; None: it is."""
    return None if isinstance(value, str) else value


def _number_or_auto(**values: int | str) -> None:
    """Refuse other words."""
    for name, value in values.items():
        if isinstance(value, str) and value not in get_args(Auto):
            raise UsageError(f'{name} is "{value}", expected a whole number or auto.')


def _must_be_text(*texts: str | None) -> None:
    """Refuse what a shell passed on although it is no UTF-8."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{text!r} is not UTF-8; give it as text.") from error


def _one_of(choices: object, **values: int | str | None) -> None:
    """Refuse what is none of the choices; None stands for a default and passes."""
    known = [str(choice) for choice in get_args(choices)]
    for name, value in values.items():
        if value is not None and value not in get_args(choices):
            hint = nearest(str(value), known)
            raise UsageError(f"{name} is {value}, expected one of {', '.join(known)}{hint}.")


def _at_least(least: int, **numbers: float | None) -> None:
    """Refuse a number that is below `least`; None stands for a default and passes."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise UsageError(f"{name} is {number}, expected {least} or more.")


def _must_be_output(out: str) -> None:
    if _ONE_SLASH.match(out):
        whole = out.replace(":/", "://", 1)
        raise UsageError(f"{out}: a URL has two slashes; write {whole}.")
    if "~" in PurePath(out).parts:
        raise UsageError(f"{out}: ~ is a folder of this name here; write the whole path.")
    if out != STDOUT and PurePath(out).suffix not in OUTPUTS:
        raise UsageError(
            f"{out}: expected an output that ends in {' or '.join(OUTPUTS)}; rename it."
        )
