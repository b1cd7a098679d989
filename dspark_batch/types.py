"""The values that cross a border between the halves; frozen, checked once, at birth.

What needs no check is a tuple with names, which is made in a third of a dataclass's time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias, TypedDict

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
FinishReason: TypeAlias = Literal["stop", "length", "scored"]  # scored: it was given
SamplingRule: TypeAlias = Literal["coupled", "rejection"]
StructureKind: TypeAlias = Literal["json_schema", "regex", "grammar", "choice"]

MOST_LOGPROBS = 20  # OpenAI's limit
_MOST_TEXTS = 1000  # and most characters of each: every round looks for all of them
_MOST_REPETITION = 100  # no logit is so far from 0 that more would change anything
_GREEDY_BELOW = 1e-5  # temperatures that DeepSpec and vLLM take for 0


class Item(NamedTuple):
    """One input record, and what names it."""

    # Position of its row among all rows of the job, from 0. It hides a method of tuples.
    index: int  # type: ignore[assignment]
    custom_id: str  # the record's `custom_id` or `id`, else its position: "#7"
    digest: str  # hex digest of the record as it was read
    where: str  # "prompts.jsonl:12", for people
    record: Mapping[str, Json] = MappingProxyType({})  # the input columns
    sample_index: int = 0  # which of several answers to one record
    # What its row says of the record: what strict JSON has no place for, and fields left aside.
    notes: tuple[str, ...] = ()

    def is_same(self, other: "Item") -> bool:
        """Whether both name the same item, whatever else is known of it."""
        return self[:3] == other[:3] and self.sample_index == other.sample_index


class Structure(NamedTuple):
    """What an answer must look like; `spec/structure.py` makes and checks it."""

    kind: StructureKind
    grammar: str  # in llguidance's words
    after_thinking: bool = True  # whether a target that thinks first may; else it begins at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one answer is drawn from the target's distribution, and where it ends."""

    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # only the likeliest tokens that together have this probability; 1: all
    top_k: int = 0  # only this many likeliest tokens; 0: all
    min_p: float = 0.0  # only tokens this likely, as a share of the likeliest one's probability
    seed: int = 0
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_ids: frozenset[int] = frozenset()  # end the answer, besides the target's own
    # Taken off the logits of tokens that the answer has: for each time, and once.
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0  # makes tokens of prompt and answer so many times less likely
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, and what is added to its logit
    bad_words: tuple[str, ...] = ()  # texts that the answer may not say
    min_tokens: int = 0  # tokens before the answer may end
    ignore_eos: bool = False  # the target's own stop tokens do not end the answer
    # How many of the likeliest tokens are told with log-probabilities, beside the chosen one, 0 to
    # 20; None: no log-probability is told.
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    structure: Structure | None = None  # None: the answer is free

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        _check("stop", list(self.stop), all(self.stop), "strings that are not empty")
        for name in ("frequency_penalty", "presence_penalty"):
            _check(name, getattr(self, name), abs(getattr(self, name)) <= 2, "-2 to 2")
        is_right = 0 < self.repetition_penalty <= _MOST_REPETITION
        _check("repetition_penalty", self.repetition_penalty, is_right, "more than 0, at most 100")
        for token, bias in self.logit_bias:
            _check(f"logit_bias of token {token}", bias, abs(bias) <= 100, "-100 to 100")
        words = list(self.bad_words)
        _check("bad_words", words, all(w.strip() for w in words), "texts that are not empty")
        for name, texts in (("stop", self.stop), ("bad_words", self.bad_words)):
            most = max(len(texts), *map(len, texts), 0)
            expected = f"at most {_MOST_TEXTS} texts of {_MOST_TEXTS} characters"
            _check(name, most, most <= _MOST_TEXTS, expected)
        _check("min_tokens", self.min_tokens, self.min_tokens >= 0, "0 or more")
        for name in ("logprobs", "prompt_logprobs"):
            num_top = getattr(self, name) or 0
            _check(name, num_top, 0 <= num_top <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}")
        if self.structure is not None:  # which alone says where the answer ends
            kind = self.structure.kind
            _check("ignore_eos", self.ignore_eos, not self.ignore_eos, f"false beside a {kind}")
            _check("min_tokens", self.min_tokens, not self.min_tokens, f"0 beside a {kind}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken and chance has no part."""
        return self.temperature < _GREEDY_BELOW

    @property
    def has_filters(self) -> bool:
        """Whether some tokens may not be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def has_penalties(self) -> bool:
        """Whether a logit depends on what was said before."""
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def steers(self) -> bool:
        """Whether some of the target's logits are changed before a token is chosen."""
        wishes = (self.logit_bias, self.bad_words, self.min_tokens, self.structure)
        return self.has_penalties or any(wishes)

    @property
    def is_own_way(self) -> bool:
        """Whether it asks for what another engine's plain greedy decoding does not know."""
        return self.steers or self.ignore_eos

    def endings(self, stop_ids: frozenset[int]) -> frozenset[int]:
        """Say which tokens end the answer, if `stop_ids` are the target's own."""
        if self.ignore_eos:
            return self.stop_ids
        return stop_ids | self.stop_ids if self.stop_ids else stop_ids


def _check(name: str, value: float | list[str], is_right: bool, expected: str) -> None:
    if not is_right:
        raise ValueError(f"{name} is {value}, expected {expected}")


class Given(NamedTuple):
    """An answer that is there already."""

    text: str
    token_ids: tuple[int, ...]  # without a stop token; may be none


@dataclass(frozen=True, slots=True)
class Request:
    """An item rendered and tokenised, ready for the engine."""

    item: Item
    prompt_ids: tuple[int, ...]  # at least one token
    max_tokens: int  # most tokens to generate, a stop token included; at least 1
    sampling: Sampling = Sampling()
    given: Given | None = None  # the answer to be scored; None: one is generated

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"{self.item.where}: a request needs at least one prompt token")
        if self.max_tokens < 1:
            raise ValueError(f"{self.item.where}: max_tokens is {self.max_tokens}, expected >= 1")


class Said(NamedTuple):
    """The two parts of what a model said."""

    reasoning: str | None  # None: it did not think
    answer: str


class Logprobs(NamedTuple):
    """What the target thought of the tokens of an answer or a prompt, before penalties.

    Natural logarithms. The lists are flat: those of `top` have K entries for each token, the
    likeliest first; of a prompt's first token, which nothing comes before, there are none.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]  # the text of each token alone; a part of a character is no text
    token_logprobs: tuple[float | None, ...]  # None: the first of a prompt
    top_ids: tuple[int, ...] = ()
    top_tokens: tuple[str, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    def behind(self, start: int) -> "Logprobs":
        """Leave out the first tokens, of which each has a log-probability."""
        at = start * (len(self.top_ids) // max(1, len(self.tokens)))
        return Logprobs(
            self.token_ids[start:],
            self.tokens[start:],
            self.token_logprobs[start:],
            self.top_ids[at:],
            self.top_tokens[at:],
            self.top_logprobs[at:],
        )


class Structured(NamedTuple):
    """How an answer met the structure that it was asked for."""

    kind: StructureKind
    parsed: bool  # whether it is whole; one that `max_tokens` or a stop string cut is not


class Completion(NamedTuple):
    """The answer to one item, and how the run went for it.

    The first token comes from prefill, every further one from a round, so
    `1 + sum(accept_lengths) == len(token_ids)`. The tuples have one entry per round. An answer that
    was given has no round.
    """

    item: Item
    text: str  # the decoded answer, without the stop token; once split, without the reasoning
    token_ids: tuple[int, ...]  # the generated ids, with the stop token where one ended it
    finish_reason: FinishReason
    prompt_tokens: int
    accept_lengths: tuple[int, ...] = ()  # tokens committed, bonus included
    num_accepted: tuple[int, ...] = ()  # drafts among the committed tokens
    num_drafted: tuple[int, ...] = ()  # drafts that the target verified
    # Of all rounds, drafts that were looked up in prompt and answer: verified, and accepted.
    looked_up: tuple[int, int] = (0, 0)
    # By round, a logit for each verified draft; None: not logged.
    confidence: tuple[tuple[float, ...], ...] | None = None
    fallback: str | None = None  # why it was decoded plainly from there on; None: it was not
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    # The answers to the turns before the last; all other fields are about the last.
    earlier: tuple["Completion", ...] = ()
    reasoning: str | None = None  # the thinking before the answer; None: there was none
    verified: bool | None = None  # whether the baseline gave the same; None: nobody looked
    prefill_s: float = 0.0
    decode_s: float = 0.0  # first round to last, other slots' share of the rounds included
    logprobs: Logprobs | None = None  # of `token_ids`; None: nobody asked
    prompt_logprobs: Logprobs | None = None  # of the prompt; None: nobody asked
    structure: Structured | None = None  # None: nobody asked for one
    worker: str | None = None  # of a fleet, "host:gpu"; None: there is no fleet

    @property
    def turns(self) -> tuple["Completion", ...]:
        """List the answers of all turns, this one last."""
        return (*self.earlier, self)

    @property
    def is_drafted(self) -> tuple[bool, ...]:
        """Tell for each token whether the drafter had proposed it."""
        return drafted_flags(self.accept_lengths, self.num_accepted)

    @property
    def num_generated(self) -> int:
        """Count the tokens that all turns generated."""
        return sum(len(turn.token_ids) for turn in self.turns)


class Partial(NamedTuple):
    """As much of an answer as is committed while it decodes."""

    token_ids: tuple[int, ...]  # at least the first; none of them ended the answer
    is_drafted: tuple[bool, ...]  # by token: had the drafter proposed it?
    logprobs: Logprobs | None = None  # of `token_ids`; None: nobody asked


def drafted_flags(accept_lengths: Sequence[int], num_accepted: Sequence[int]) -> tuple[bool, ...]:
    """Tell for each token whether the drafter had proposed it, from an answer's rounds."""
    flags = [False]  # prefill's
    for length, accepted in zip(accept_lengths, num_accepted, strict=True):
        flags += [True] * accepted + [False] * (length - accepted)
    return tuple(flags)


class WorkerJson(TypedDict):
    """What one worker of a fleet did in this start, those before it in its place included."""

    name: str  # "host:gpu"
    slots: int
    rows: int  # requests that it answered
    tokens: int  # that it generated for these
    deaths: int


_LEAST_SAMPLES = 3  # one alone can be a round in which the machine did something else


@dataclass(frozen=True, slots=True)
class Gauge:
    """How full the engine is, and what it has spent; seconds are those of this start."""

    busy_slots: float  # mean over the rounds; 0 before the first
    slots: int
    memory_bytes: int  # that MLX holds now
    peak_memory_bytes: int
    prefill_s: float  # prompts through the target
    round_s: float  # drafting and verifying, the wait for the device included
    # Of the device at most, while the host worked; None: the host's own cores are the device.
    idle_s: float | None = None
    prompt_tokens: int = 0  # that went through the target, what is shared only once
    # Rounds that were timed part by part; the parts of the others run into each other.
    sampled_rounds: int = 0
    sampled_draft_s: float = 0.0
    sampled_verify_s: float = 0.0
    workers: tuple[WorkerJson, ...] = ()  # of a fleet, whose seconds are a mean; (): there is none

    @property
    def draft_s(self) -> float | None:
        """Estimate the part of `round_s` that is drafting; None: there are too few samples."""
        if self.sampled_rounds < _LEAST_SAMPLES:
            return None
        sampled_s = self.sampled_draft_s + self.sampled_verify_s
        return self.round_s * self.sampled_draft_s / sampled_s

    @property
    def verify_s(self) -> float | None:
        """Estimate the part of `round_s` that is verifying; None: there are too few samples."""
        draft_s = self.draft_s
        return None if draft_s is None else self.round_s - draft_s


class PlanJson(TypedDict):
    """How a job begins."""

    slots: int
    draft_length: int  # 0: without speculation
    why: str  # one sentence for people


class SetupJson(TypedDict):
    """How a pair decodes on its machine, as the manifest has it."""

    plan: PlanJson
    step_shape: Sequence[int] | None  # slots and tokens that every pass has; None: any
    divergence: float  # how far logits lay from mlx-lm's own
    dtype: str
    most_positions: int  # that all slots may cache
    machine: Mapping[str, Json]
    blas_threads: int | None  # None: this MLX has no BLAS that we know


# Codes of failures that the record decides: it fails again until it is another one.
OF_THE_RECORD = ("bad_record", "prompt_too_long")


class Failure(NamedTuple):
    """Why an item has no answer."""

    item: Item
    code: str  # "bad_record", "prompt_too_long", "engine", ...: the row's error.code
    message: str  # where, what is wrong (expected and found), what to do
    is_skipped: bool = False  # left out because the job says so, which is no error


Outcome: TypeAlias = Completion | Failure
