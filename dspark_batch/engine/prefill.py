"""Prompts through the target: several in one pass, and what they share only once."""

from collections.abc import Generator, Sequence
from operator import sub
from typing import NamedTuple, TypeAlias

import mlx.core as mx

from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.engine.fallback import DrafterFault, guarded
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefix_cache import CHUNK, Prefix, PrefixCache, chunks_of
from dspark_batch.engine.shapes import Shapes

Prompt: TypeAlias = Sequence[int]  # token ids, at least one


class Prefilled(NamedTuple):
    """Prompts that are ready to decode; slot i of the caches holds prompt i."""

    cache: SlotCache  # the target's
    context: SlotCache  # the drafter's
    logits: mx.array  # [P, V], of the first tokens of the answers
    cached: list[int]  # positions of each prompt that came from the prefix cache
    num_computed: int  # positions that went through the target, shared beginnings included
    fallback: str | None  # why the drafter has no context; None: it has one


def prefill(
    passes: Passes, shapes: Shapes, prompts: Sequence[Prompt], prefixes: PrefixCache
) -> Generator[None, None, Prefilled]:
    """Run prompts through the target, and its features into the drafter's context.

    Beginnings that other prompts share come from the prefix cache, and go there first if they are
    not in it. A generator that yields between passes, so that rounds can go on meanwhile.

    Args:
        passes: of target and drafter.
        shapes: those that may run.
        prompts: at most as many as one pass can take.
        prefixes: what is stored already.
    """
    num_computed = 0
    tried: set[Prompt] = set()
    while beginnings := _missing(prompts, prefixes, tried):
        tried.update(beginnings)
        found = [prefixes.find(ids) for ids in beginnings]
        filled = yield from _computed(passes, shapes, beginnings, found)
        yield
        num_computed += filled.num_computed
        if filled.fallback is not None:
            break
        for slot, ids in enumerate(beginnings):
            where = (slot, prefixes.num_stored(ids), len(ids))
            prefixes.store(ids, (filled.cache.snapshot(*where), filled.context.snapshot(*where)))
    found = [prefixes.find(ids[:-1]) for ids in prompts]  # the last token gives the logits
    filled = yield from _computed(passes, shapes, prompts, found)
    return filled._replace(num_computed=filled.num_computed + num_computed)


def prefill_alone(passes: Passes, shapes: Shapes, prompt: Prompt) -> Prefilled:
    """Run one prompt through, with nothing cached, in one go."""
    filling = prefill(passes, shapes, [prompt], PrefixCache(0))
    while True:
        try:
            next(filling)
        except StopIteration as through:
            return through.value


def _missing(prompts: Sequence[Prompt], prefixes: PrefixCache, tried: set[Prompt]) -> list[Prompt]:
    """List shared beginnings that are not stored, of those that go on alike only the shortest."""
    lengths = [CHUNK * prefixes.num_shared(chunks_of(ids)) for ids in prompts]
    shared = {tuple(ids[:length]) for ids, length in zip(prompts, lengths, strict=True)} - {()}
    first: dict[Prompt, Prompt] = {}  # what is stored and one chunk more -> a beginning
    for ids in sorted(shared - tried, key=lambda ids: (len(ids), ids)):
        stored = prefixes.find(ids).length
        if stored < len(ids):
            first.setdefault(ids[: stored + CHUNK], ids)
    return list(first.values())


def _computed(
    passes: Passes, shapes: Shapes, prompts: Sequence[Prompt], found: Sequence[Prefix]
) -> Generator[None, None, Prefilled]:
    """Compute what is not found of some prompts."""
    filling = _Filling(passes, shapes, prompts, found)
    logits = filling.run()
    while filling.left:
        yield
        logits = filling.run()
    cached = [prefix.length for prefix in found]
    num_computed = sum(map(len, prompts)) - sum(cached)
    return Prefilled(
        filling.cache,
        filling.context,
        logits[: len(prompts)],
        cached,
        num_computed,
        filling.fallback,
    )


class _Filling:
    """The passes over some prompts, a slot each; ends with the logits of all."""

    def __init__(
        self, passes: Passes, shapes: Shapes, prompts: Sequence[Prompt], found: Sequence[Prefix]
    ) -> None:
        self._passes = passes
        self._shapes = shapes
        self._prompts = prompts
        self._ends = list(map(len, prompts))
        self._done = [prefix.length for prefix in found]
        self.fallback: str | None = None
        self._logits: mx.array | None = None  # as `run` gives them; None: nothing ran
        slots, _ = shapes.prefill_pass(len(prompts), self.left)
        room = self._room()
        self.cache, self.context = passes.make_cache(slots, room), passes.make_context(slots, room)
        parts = [prefix.parts for prefix in found] + [[]] * (slots - len(prompts))
        self.cache.begin_with([[target for target, _ in each] for each in parts])
        self.context.begin_with([[drafter for _, drafter in each] for each in parts])

    @property
    def left(self) -> int:
        """Tokens of the prompt that has the most left."""
        return max(map(sub, self._ends, self._done))

    def _room(self) -> int:
        """Count the positions that the passes write; a prompt that is through is padded, too."""
        done, room = self._done, 0
        while (left := max(map(sub, self._ends, done))) > 0:
            _, width = self._shapes.prefill_pass(len(self._prompts), left)
            room = max(room, max(done) + width)
            done = [min(n + width, end) for n, end in zip(done, self._ends, strict=True)]
        return room

    def run(self) -> mx.array:
        """Run one pass over all prompts; return logits [S, V], right for those that are through."""
        slots, width = self._shapes.prefill_pass(len(self._prompts), self.left)
        tokens: list[int] = []
        counts = [0] * slots
        for slot, (ids, done) in enumerate(zip(self._prompts, self._done, strict=True)):
            tokens += ids[done : done + width]
            counts[slot] = len(tokens) - slot * width
            tokens += [0] * (width - counts[slot])
        tokens += [0] * (slots * width - len(tokens))
        ran = mx.array(counts)
        self.cache.expect(ran)
        logits, features = self._passes.run_to(
            self.cache, mx.array(tokens).reshape(slots, width), mx.maximum(ran - 1, 0)
        )
        self._extend(features)
        self.cache.keep(ran)
        self.context.keep(ran)
        self._logits = self._updated(ran, logits)
        self._done = [n + count for n, count in zip(self._done, counts, strict=False)]
        mx.async_eval(self._logits, self.cache.arrays(), self.context.arrays())
        return self._logits

    def _updated(self, ran: mx.array, last: mx.array) -> mx.array:
        """Take logits [S, V] behind the last of the tokens that ran, [S], where there were any."""
        if self._logits is None:
            return last
        return mx.where(ran[:, None] > 0, last, self._logits)

    def _extend(self, features: mx.array | None) -> None:
        """Extend the drafter's context, and note why if that failed."""
        if self.fallback is None:
            try:
                guarded(lambda: self._passes.extend(self.context, features))
            except DrafterFault as fault:
                self.fallback = str(fault)
