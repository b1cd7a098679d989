"""The values that cross a border between the halves; frozen, checked once, at birth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Item:
    """One input record, and what names it."""

    index: int  # position among all records of the job, from 0
    custom_id: str  # the record's `custom_id` or `id`, else its index in decimal
    digest: str  # hex digest of the record as it was read
    where: str  # "prompts.jsonl:12", for people
    record: Mapping[str, Json] = field(default_factory=dict)  # the input columns
    sample_index: int = 0  # which of several answers to one record


@dataclass(frozen=True, slots=True)
class Request:
    """An item rendered and tokenised, ready for the engine."""

    item: Item
    prompt_ids: tuple[int, ...]  # at least one token
    max_tokens: int  # most tokens to generate, a stop token included; at least 1

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"{self.item.where}: a request needs at least one prompt token")
        if self.max_tokens < 1:
            raise ValueError(f"{self.item.where}: max_tokens is {self.max_tokens}, expected >= 1")


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one item, and how the run went for it.

    The first token comes from prefill, every further one from a round, so
    `1 + sum(accept_lengths) == len(token_ids)`. The three tuples have one number per round.
    """

    item: Item
    text: str  # the decoded answer, without the stop token
    token_ids: tuple[int, ...]  # the generated ids, with the stop token where one ended it
    finish_reason: FinishReason
    prompt_tokens: int
    accept_lengths: tuple[int, ...] = ()  # tokens committed, bonus included
    num_accepted: tuple[int, ...] = ()  # drafts among the committed tokens
    num_drafted: tuple[int, ...] = ()  # drafts that the target verified
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    prefill_s: float = 0.0
    decode_s: float = 0.0  # first round to last, other slots' share of the rounds included


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no answer."""

    item: Item
    code: str  # "bad_record", "prompt_too_long", "engine", ...: the row's error.code
    message: str  # where, what is wrong (expected and found), what to do


Outcome: TypeAlias = Completion | Failure
