"""Answers without files: a stream of prompts, or one prompt."""

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, Unpack

from dspark_batch.answers.text_stream import TextStream
from dspark_batch.drafters.drafter import Drafter
from dspark_batch.engine.engine import Engine
from dspark_batch.errors import ModelError, UsageError
from dspark_batch.intake.json_text import dump
from dspark_batch.intake.reader import record_of_line
from dspark_batch.models.target import Target
from dspark_batch.models.tokenizer import Tokenizer
from dspark_batch.opening import Opened, answer, ask, open_pair
from dspark_batch.pair import Pair
from dspark_batch.spec.spec import (
    STDOUT,
    Auto,
    Bits,
    DrafterBits,
    Dtype,
    LastAssistant,
    Overflow,
    Spec,
    SpecialTokens,
    Thinking,
)
from dspark_batch.types import (
    Completion,
    Failure,
    FinishReason,
    Item,
    Json,
    Outcome,
    Request,
    Sampling,
    SamplingRule,
)


class Options(TypedDict, total=False):
    """The options of `run` that are about answers; meanings and defaults are those of `Spec`."""

    family: str | None
    target: str | None
    drafter: str | None
    drafter_bits: DrafterBits
    target_bits: Bits | None
    trust_remote_code: bool
    dtype: Dtype | None
    system_prompt: str | None
    thinking: Thinking | None
    system_column: str | None
    prompt_column: str | None
    messages_column: str | None
    last_assistant: LastAssistant
    ignore_fields: tuple[str, ...]
    special_tokens: SpecialTokens
    template: str | None
    on_overflow: Overflow
    id_column: str | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: tuple[str, ...]
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    bad_words: tuple[str, ...]
    min_tokens: int
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    score: str | None
    json_schema: str | None
    regex: str | None
    grammar: str | None
    choice: tuple[str, ...]
    sampling: SamplingRule
    slots: int | Auto
    draft_length: int | Auto
    lookup: bool
    no_prefix_cache: bool
    confidence_threshold: float
    log_confidence: bool


def generate(
    prompts: Iterable[str | Mapping[str, Json]], **options: Unpack[Options]
) -> Iterator[Completion | Failure]:
    """Answer prompts, and give each answer as soon as it is finished; no file is written.

        for row in generate(["Name a sea.", {"messages": [...]}], family="tiny"):
            print(row.item.index, row.text)

    The pair is loaded before this returns. Prompts are pulled lazily, a few ahead.

    Args:
        prompts: texts, or records as a line of an input of `run` has them: with a `prompt` or
            `messages`, and their own `custom_id` and `sampling_params` if they want.
        options: as `run` has them.

    Yields:
        A `Completion`, or a `Failure` that says why a prompt has no answer, in the order in which
        answers finish. `item.index` counts the prompts from 0, and `item.record` is the prompt.

    Raises:
        UsageError: an option is impossible, or a prompt is no text and no record.
        ModelError: the pair cannot be loaded.
    """
    spec = spec_of_answers(options)
    return _rows(spec, open_pair(spec, None), prompts)


def _rows(
    spec: Spec, opened: Opened, prompts: Iterable[str | Mapping[str, Json]]
) -> Iterator[Outcome]:
    read = (_read(index, prompt, spec) for index, prompt in enumerate(prompts))
    asked = (each if isinstance(each, Failure) else ask(spec, opened, each) for each in read)
    return answer(spec, opened, asked, lambda item: True)


def spec_of_answers(options: Options) -> Spec:
    """Make a spec of options that are about answers.

    Raises:
        UsageError: an option is none of these, or impossible.
    """
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        raise UsageError(f"{unknown[0]} is no option here; see help(dspark_batch.generate).")
    return Spec(inputs=("prompts",), out=STDOUT, **options)


def _read(index: int, prompt: str | Mapping[str, Json], spec: Spec) -> Item | Failure:
    """Read a prompt as a run reads a line."""
    where = f"prompts[{index}]"
    if isinstance(prompt, str):
        prompt = {spec.prompt_name: prompt}
    if not isinstance(prompt, Mapping):
        raise UsageError(f"{where} is {prompt!r}, expected a text, or a record with a prompt.")
    try:
        line = dump(dict(prompt), is_odd=True)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: no JSON ({error}); give texts, numbers and lists.") from error
    return record_of_line(index, where, line, spec.id_column)


class Piece(NamedTuple):
    """Text of an answer that grows."""

    text: str
    is_drafted: bool  # whether the drafter had proposed the token that ends it


class OnePrompt:
    """One prompt before a loaded pair, whose answer can be read while it is made.

    Args:
        prompt: what the user says.
        options: as `generate` has them.

    Raises:
        UsageError: an option is impossible, or the prompt cannot be asked.
        ModelError: the pair cannot be loaded.
    """

    def __init__(self, prompt: str, **options: Unpack[Options]) -> None:
        self._spec = spec_of_answers({**options, "slots": 1})
        self._opened = open_pair(self._spec, None, num_items=1)
        read = _read(0, {self._spec.prompt_name: prompt}, self._spec)
        request = read if isinstance(read, Failure) else ask(self._spec, self._opened, read)
        if isinstance(request, Failure):
            raise UsageError(request.message)
        self._request = request

    def pieces(self) -> Generator[Piece, None, Completion]:
        """Give the text as it is committed; together it is the answer's text, reasoning included.

        Returns:
            The completion, for who reads it with `yield from`.

        Raises:
            ModelError: the target's logits are not numbers, or the answer cannot be decoded.
        """
        engine, request = self._opened.steps, self._request
        stream = TextStream(
            self._opened.decode,
            request.sampling.stop,
            min_tokens=request.sampling.min_tokens,
        )
        engine.add(request)
        num_seen = 0
        while True:
            ended = engine.step()
            for outcome in ended:
                completion = _completed(outcome)
                yield from _rest(stream, completion, num_seen)
                return completion
            if partial := engine.so_far(request.item):
                yield from _pieces(stream, partial.token_ids, partial.is_drafted, num_seen)
                num_seen = len(partial.token_ids)

    def plainly(self) -> Completion:
        """Answer it again without a drafter."""
        if self._opened.baseline is None:
            raise UsageError("this engine has no baseline; open a pair of its own.")
        (outcome,) = self._opened.baseline("engine").generate([self._request])
        return _completed(outcome)


def _pieces(
    stream: TextStream, token_ids: Sequence[int], is_drafted: Sequence[bool], start: int
) -> Iterator[Piece]:
    for token, flag in zip(token_ids[start:], is_drafted[start:], strict=True):
        if text := stream.add(token):
            yield Piece(text, flag)


def _rest(stream: TextStream, answer: Completion, start: int) -> Iterator[Piece]:
    *flags, last = answer.is_drafted
    yield from _pieces(stream, answer.token_ids[:-1], flags, start)
    if text := stream.end(answer.text):
        yield Piece(text, last)


def _completed(outcome: Outcome) -> Completion:
    if isinstance(outcome, Failure):
        raise ModelError(outcome.message)
    return outcome


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
    if target.config is None:
        raise UsageError("the target is none of `load_pair`; load it with its drafter.")
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
    completion = _completed(outcome)
    return Generation(
        text=completion.text,
        token_ids=list(completion.token_ids),
        accept_lengths=list(completion.accept_lengths),
        finish_reason=completion.finish_reason,
        decode_s=completion.decode_s,
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
