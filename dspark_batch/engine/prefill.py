"""Prompts through the target: several in one pass, and what they share only once."""

from collections.abc import Generator, Sequence
from operator import sub
from typing import NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from dspark_batch.answers.sampling import scores_of
from dspark_batch.answers.sequence import Score
from dspark_batch.caches.prefix_cache import CHUNK, Prefix, PrefixCache, chunks_of
from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.engine.fallback import DrafterFault, guarded
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.shapes import Shape, Shapes, common_len
from dspark_batch.numerics.scores import Scores, score
from dspark_batch.types import Request

Ids: TypeAlias = Sequence[int]  # token ids, at least one

# Logits that a pass may give in all: 128 MiB of float32. Where more tokens are to be scored, passes
# are narrower, so that a long prompt needs no more memory than a short one.
_MOST_LOGITS = 1 << 25


class Prompt(NamedTuple):
    """What goes through the target, and which tokens it is asked to score."""

    ids: Ids
    first: int  # place of the first scored token; len(ids) is the one behind them
    scored: Ids = ()  # the tokens from there on
    num_top: int = 0  # likeliest tokens that are scored beside each

    @classmethod
    def of(cls, request: Request) -> "Prompt":
        """Say what a request needs of the target before its answer decodes.

        An answer that is given goes through as a prompt does, but for its last token.
        """
        prompt, sampling = request.prompt_ids, request.sampling
        given = request.given.token_ids if request.given is not None else ()
        whole = (*prompt, *given)
        ids = whole[:-1] if given else whole
        of_prompt = sampling.prompt_logprobs
        first = len(prompt) if of_prompt is None else 1
        num_top = max(of_prompt or 0, (sampling.logprobs or 0) if given else 0)
        return cls(ids, first, whole[first:], num_top)

    @property
    def beginning(self) -> Ids:
        """The tokens whose logits nobody reads, so that they may come from elsewhere."""
        return self.ids[: min(self.first, len(self.ids)) - 1]

    def scored_in(self, start: int, stop: int) -> range:
        """Say behind which of the tokens start..stop one is scored, counted from start on."""
        first = self.first - 1
        last = min(first + len(self.scored), stop) - start
        return range(max(first - start, 0), max(last, 0))


def whole(ids: Ids) -> Prompt:
    """Ask for no scores."""
    return Prompt(ids, len(ids))


class Told(NamedTuple):
    """The scores of one pass."""

    counts: list[int]  # by prompt, of the scored tokens; they come first
    scores: Scores  # [S, P]


class Prefilled(NamedTuple):
    """Prompts that are ready to decode; slot i of the caches holds prompt i."""

    cache: SlotCache  # the target's
    context: SlotCache  # the drafter's
    logits: mx.array  # [P, V], of the first tokens of the answers
    cached: list[int]  # positions of each prompt that came from the prefix cache
    num_computed: int  # positions that went through the target, shared beginnings included
    has_context: bool  # whether the drafter was to have one
    fallback: str | None  # why it has none all the same; None: nothing failed
    told: list[Told]  # by pass, where anybody asked

    def scores(self) -> list[list[Score]]:
        """Bring the scores of each prompt's tokens to the host; waits for the device."""
        found: list[list[Score]] = [[] for _ in self.cached]
        for counts, scores in self.told:
            by_slot = scores_of(scores)
            for slot, count in enumerate(counts):
                found[slot] += by_slot[slot][:count]
        return found


def prefill(
    passes: Passes,
    shapes: Shapes,
    prompts: Sequence[Prompt],
    prefixes: PrefixCache,
    *,
    with_context: bool = True,
) -> Generator[None, None, Prefilled]:
    """Run prompts through the target, and its features into the drafter's context.

    Beginnings that other prompts share come from the prefix cache, and go there first if they are
    not in it. A generator that yields between passes, so that rounds can go on meanwhile.

    Args:
        passes: of target and drafter.
        shapes: those that may run.
        prompts: at most as many as one pass can take.
        prefixes: what is stored already.
        with_context: whether the drafter will be asked about these prompts. Beginnings are stored
            with its context in any case, for others.
    """
    num_computed = 0
    tried: set[Ids] = set()
    while beginnings := _missing(prompts, prefixes, tried):
        tried.update(beginnings)
        found = [prefixes.find(ids) for ids in beginnings]
        filled = yield from _computed(passes, shapes, [*map(whole, beginnings)], found)
        yield
        num_computed += filled.num_computed
        if filled.fallback is not None:
            break
        for slot, ids in enumerate(beginnings):
            where = (slot, prefixes.num_stored(ids), len(ids))
            prefixes.store(ids, (filled.cache.snapshot(*where), filled.context.snapshot(*where)))
    found = [prefixes.find(prompt.beginning) for prompt in prompts]
    filled = yield from _computed(passes, shapes, prompts, found, with_context=with_context)
    return filled._replace(num_computed=filled.num_computed + num_computed)


def prefill_alone(passes: Passes, shapes: Shapes, ids: Ids) -> Prefilled:
    """Run one prompt through, with nothing cached, in one go."""
    filling = prefill(passes, shapes, [whole(ids)], PrefixCache(0))
    while True:
        try:
            next(filling)
        except StopIteration as through:
            return through.value


def _missing(prompts: Sequence[Prompt], prefixes: PrefixCache, tried: set[Ids]) -> list[Ids]:
    """List shared beginnings that are not stored, of those that go on alike only the shortest."""
    begun = [prompt.ids[: len(prompt.beginning) + 1] for prompt in prompts]
    lengths = [CHUNK * prefixes.num_shared(chunks_of(ids)) for ids in begun]
    shared = {tuple(ids[:length]) for ids, length in zip(begun, lengths, strict=True)} - {()}
    first: dict[Ids, Ids] = {}  # what is stored and one chunk more -> a beginning
    for ids in sorted(shared - tried, key=lambda ids: (len(ids), ids)):
        stored = prefixes.find(ids).length
        if stored < len(ids):
            first.setdefault(ids[: stored + CHUNK], ids)
    return list(first.values())


def _computed(
    passes: Passes,
    shapes: Shapes,
    prompts: Sequence[Prompt],
    found: Sequence[Prefix],
    *,
    with_context: bool = True,
) -> Generator[None, None, Prefilled]:
    """Compute what is not found of some prompts."""
    filling = _Filling(passes, shapes, prompts, found, with_context=with_context)
    logits = filling.run()
    while filling.left:
        yield
        logits = filling.run()
    cached = [prefix.length for prefix in found]
    num_computed = sum(len(prompt.ids) for prompt in prompts) - sum(cached)
    return Prefilled(
        filling.cache,
        filling.context,
        logits[: len(prompts)],
        cached,
        num_computed,
        with_context,
        filling.fallback,
        filling.told,
    )


class _Filling:
    """The passes over some prompts, a slot each; ends with the logits of all."""

    def __init__(
        self,
        passes: Passes,
        shapes: Shapes,
        prompts: Sequence[Prompt],
        found: Sequence[Prefix],
        *,
        with_context: bool,
    ) -> None:
        self._passes = passes
        self._with_context = with_context
        self._shapes = shapes
        self._prompts = prompts
        self._ends = [len(prompt.ids) for prompt in prompts]
        self._done = [prefix.length for prefix in found]
        self.fallback: str | None = None
        self.told: list[Told] = []
        self._logits: mx.array | None = None  # as `run` gives them; None: nothing ran
        slots, _ = self._pass(self._done)
        room = self._room()
        self.cache, self.context = passes.make_cache(slots, room), passes.make_context(slots, room)
        parts = [prefix.parts for prefix in found] + [[]] * (slots - len(prompts))
        pairs = zip(prompts, found, strict=True)
        known = [prompt.ids[: prefix.length + 1] for prompt, prefix in pairs]
        shared = common_len(known) if shapes.share(len(known)) else 0
        self.cache.begin_with([[target for target, _ in each] for each in parts], shared)
        self.context.begin_with([[drafter for _, drafter in each] for each in parts], shared)

    @property
    def left(self) -> int:
        """Tokens of the prompt that has the most left."""
        return max(map(sub, self._ends, self._done))

    def _pass(self, done: Sequence[int]) -> Shape:
        """Choose the next pass: a narrower one, where it would give too many logits."""
        num_prompts, left = len(self._prompts), max(map(sub, self._ends, done))
        slots, width = self._shapes.prefill_pass(num_prompts, left)
        most = _MOST_LOGITS // self._passes.vocab_size
        if slots * max(map(len, self._scored(done, width))) <= most:
            return slots, width
        return self._shapes.prefill_pass(num_prompts, left, most)

    def _scored(self, done: Sequence[int], width: int) -> list[range]:
        """Say by prompt at which positions of a pass a token is scored."""
        pairs = zip(self._prompts, done, strict=True)
        return [prompt.scored_in(n, min(n + width, len(prompt.ids))) for prompt, n in pairs]

    def _room(self) -> int:
        """Count the positions that the passes write; a prompt that is through is padded, too."""
        done, room = self._done, 0
        while max(map(sub, self._ends, done)) > 0:
            _, width = self._pass(done)
            room = max(room, max(done) + width)
            done = [min(n + width, end) for n, end in zip(done, self._ends, strict=True)]
        return room

    def run(self) -> mx.array:
        """Run one pass over all prompts; return logits [S, V], right for those that are through."""
        slots, width = self._pass(self._done)
        self.cache.see(max(self._done) + width)
        tokens: list[int] = []
        counts = [0] * slots
        for slot, (prompt, done) in enumerate(zip(self._prompts, self._done, strict=True)):
            tokens += prompt.ids[done : done + width]
            counts[slot] = len(tokens) - slot * width
            tokens += [0] * (width - counts[slot])
        tokens += [0] * (slots * width - len(tokens))
        ran = mx.array(counts)
        self.cache.expect(ran)
        scored = self._scored(self._done, width)
        at = self._positions(counts, scored)
        logits, features = self._passes.run_to(
            self.cache, mx.array(tokens).reshape(slots, width), mx.array(at)
        )
        if any(scored):
            self._score(logits, scored)
        self._extend(features)
        self.cache.keep(ran)
        self.context.keep(ran)
        self._logits = self._updated(ran, logits[:, -1])
        self._done = [n + count for n, count in zip(self._done, counts, strict=False)]
        scores = [told.scores for told in self.told[-1:]]
        mx.async_eval(self._logits, scores, self.cache.arrays(), self.context.arrays())
        return self._logits

    def _positions(self, counts: Sequence[int], scored: Sequence[range]) -> np.ndarray:
        """Say at which positions [S, P] of a pass logits are read: the scored ones, then the last.

        Args:
            counts: by slot, of the tokens that run.
            scored: by prompt.
        """
        most = self._shapes.num_scored(max(map(len, scored)))
        last = np.maximum(np.array(counts, dtype=np.int32) - 1, 0)
        at = np.repeat(last[:, None], most + 1, axis=1)
        for slot, places in enumerate(scored):
            at[slot, : len(places)] = places
        return at

    def _score(self, logits: mx.array, scored: Sequence[range]) -> None:
        """Score what was asked of a pass that gave logits [S, P, V]."""
        tokens = np.zeros(logits.shape[:2], dtype=np.int32)
        for slot, (prompt, places) in enumerate(zip(self._prompts, scored, strict=True)):
            at = self._done[slot] + places.start + 1 - prompt.first
            tokens[slot, : len(places)] = prompt.scored[at : at + len(places)]
        num_top = max(prompt.num_top for prompt in self._prompts)
        scores = score(logits, mx.array(tokens), num_top)
        self.told.append(Told([*map(len, scored)], scores))

    def _updated(self, ran: mx.array, last: mx.array) -> mx.array:
        """Take logits [S, V] behind the last of the tokens that ran, [S], where there were any."""
        if self._logits is None:
            return last
        return mx.where(ran[:, None] > 0, last, self._logits)

    def _extend(self, features: mx.array | None) -> None:
        """Extend the drafter's context, and note why if that failed."""
        if self._with_context and self.fallback is None:
            try:
                guarded(lambda: self._passes.extend(self.context, features))
            except DrafterFault as fault:
                self.fallback = str(fault)
