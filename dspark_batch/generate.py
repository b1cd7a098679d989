"""One prompt, one answer: the interface that users of this method know."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_batch.engine.engine import Engine
from dspark_batch.errors import ModelError, UsageError
from dspark_batch.models.drafter import Drafter
from dspark_batch.models.load import Pair
from dspark_batch.models.target import Target
from dspark_batch.models.tokenizer import Tokenizer
from dspark_batch.types import Failure, FinishReason, Item, Request, Sampling, SamplingRule


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer and how it came; the first token is prefill's, each further one a round's."""

    text: str  # without the stop token, and only up to a stop string; "" without a tokenizer
    token_ids: list[int]  # with the stop token, or the token that completed a stop string
    accept_lengths: list[int]  # tokens of each round that came out, bonus included
    finish_reason: FinishReason
    decode_s: float  # all rounds

    @property
    def rounds(self) -> int:
        """How many rounds of drafting and verifying it took."""
        return len(self.accept_lengths)

    @property
    def mean_accept_len(self) -> float:
        """Tokens per round, bonus included; 0 without rounds."""
        return sum(self.accept_lengths) / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_sec(self) -> float:
        """Tokens of rounds per second of rounds, without prefill; 0 without rounds."""
        return sum(self.accept_lengths) / self.decode_s if self.rounds else 0.0


def speculative_generate(  # noqa: PLR0913  the names that users of this method know
    target: Target,
    tokenizer: Tokenizer | None,
    drafter: Drafter,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 256,
    max_draft: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    sampling: SamplingRule = "coupled",
    seed: int = 0,
    confidence_threshold: float = 0.0,
    stop: str | int | Sequence[str | int] | None = None,
    system: str | None = None,
) -> Generation:
    """Answer one prompt with a pair from `load_pair`.

    Args:
        target: as loaded.
        tokenizer: None if the target has none; then the prompt must be token ids.
        drafter: as loaded.
        prompt: what the user says, or token ids to go on from as they are.
        max_new_tokens: most tokens to generate, a stop token included.
        max_draft: drafts per round; None for the drafter's block, 0 for plain decoding.
        temperature: 0 takes the most likely token. Who drafts, and how much, changes nothing of the
            answer, at any temperature with "coupled" sampling, except where two tokens tie up to
            rounding; a job's exact mode settles these, too.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only this many likeliest tokens; 0 for all.
        min_p: only tokens this likely, as a share of the likeliest one's probability.
        sampling: "coupled", or "rejection" (the paper's: more acceptance, same distribution,
            answers that depend on the drafts).
        seed: names the noise; the prompt does too.
        confidence_threshold: a block is verified up to its first draft below this; 0 for all.
        stop: strings and token ids that end the answer, besides the target's own.
        system: a system prompt.

    Raises:
        UsageError: an argument is impossible, or does not go with the others.
        ModelError: the target's logits are not numbers.
    """
    pair = Pair(target, tokenizer, drafter, target.config)
    prompt_ids = _prompt_ids(tokenizer, prompt, system)
    room = pair.config.context_length - len(prompt_ids)
    if room < 1:
        raise UsageError(
            f"{len(prompt_ids)} prompt tokens leave no room in a context of "
            f"{pair.config.context_length}; shorten the prompt by {1 - room} tokens or more."
        )
    stops, stop_ids = _split_stops(stop)
    try:
        choices = Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop=stops,
            stop_ids=stop_ids,
        )
        request = Request(_item(prompt_ids), prompt_ids, min(max_new_tokens, room), choices)
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    engine = Engine(
        pair,
        draft_length=max_draft,
        confidence_threshold=confidence_threshold,
        sampling=sampling,
    )
    return _answer(engine, request)


def _answer(engine: Engine, request: Request) -> Generation:
    (outcome,) = engine.generate([request])
    if isinstance(outcome, Failure):
        raise ModelError(outcome.message)
    return Generation(
        text=outcome.text,
        token_ids=list(outcome.token_ids),
        accept_lengths=list(outcome.accept_lengths),
        finish_reason=outcome.finish_reason,
        decode_s=outcome.decode_s,
    )


def _prompt_ids(
    tokenizer: Tokenizer | None, prompt: str | Sequence[int], system: str | None
) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        if system is not None:
            raise UsageError("system goes with a prompt that is text; put it into the token ids.")
        return tuple(prompt)
    if tokenizer is None:
        raise UsageError("The target has no tokenizer, so it cannot read text; give token ids.")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tuple(tokenizer.render(messages))
    except ValueError as error:
        raise UsageError(f"This prompt cannot be rendered: {error}.") from error


def _split_stops(
    stop: str | int | Sequence[str | int] | None,
) -> tuple[tuple[str, ...], frozenset[int]]:
    """Tell the stop strings from the stop ids."""
    stops = [] if stop is None else [stop] if isinstance(stop, str | int) else list(stop)
    strings = tuple(s for s in stops if isinstance(s, str))
    return strings, frozenset(s for s in stops if not isinstance(s, str))


def _item(prompt_ids: tuple[int, ...]) -> Item:
    """Name the prompt, so that its noise is its own."""
    digest = hashlib.sha256(repr(prompt_ids).encode()).hexdigest()
    return Item(0, "0", digest, "prompt")
