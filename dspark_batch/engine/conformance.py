"""Whether a target gives the same bits in passes of any shape, and which bits these are."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dspark_batch import device
from dspark_batch.caches.prefix_cache import PrefixCache
from dspark_batch.caches.slot_cache import Part, SlotCache
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.fallback import FAULTS
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import Prefilled, prefill, whole
from dspark_batch.engine.shapes import FALLBACK, Shapes
from dspark_batch.errors import ModelError, is_out_of_memory
from dspark_batch.models.target import Target
from dspark_batch.numerics.attention import BLOCK

_PROMPTS = (3, 21, 40)  # tokens of the prompts
_ANSWER = 8  # tokens behind each of them
_STAY = 2  # of these
_PACKED = (8, 3, 5)  # of these, by prompt, in a packed pass
_ELSEWHERE = 100  # where tokens come from that are taken back

# How far logits may lie from those of mlx-lm's own pass, relative to their spread. Rounding moved
# those of 60 tiny families by at most 3e-6 in float32, 0.006 in float16 and 0.04 in bfloat16, and
# real models have more layers. A factor of 1.1 behind attention moves them by 0.2, a position that
# is wrong by one moves them by 1.
_MOST_DISTANCE = {mx.float32: 0.01, mx.float16: 0.05, mx.bfloat16: 0.2}


class Conformance(NamedTuple):
    """What a target's passes give on this device."""

    shapes: Shapes
    numerics: str  # names the bits
    divergence: float  # of a logit at most, from mlx-lm's own pass


def conformance(target: Target) -> Conformance:
    """Run a few tokens through a target in passes of different shapes, and compare the bits.

    All slots at once and eight tokens wide, of which two stay, behind a step that was taken back;
    and one slot alone, token by token, with more room behind its end. Logits and what is remembered
    must be equal. If they are not, although every product runs over safe rows, the target has an
    operation whose bits depend on the shape of a pass. Then all of its passes have one shape. So
    they have if the target does not call its head, but multiplies by the head's weight itself.
    Passes over some tokens of each slot are compared, too, and are none of its passes if a bit of
    theirs differs, or they fail.

    Equal bits may be equally wrong, so the logits must also be near those of mlx-lm's own pass.

    Raises:
        ModelError: the target would be decoded wrongly, or cannot run; one sentence says why.
    """
    try:
        return _compared(target)
    except (*FAULTS, AttributeError) as error:
        if is_out_of_memory(error):  # the job takes fewer slots next time
            raise
        raise ModelError(
            "mlx-lm's code of this target cannot run over slots of different lengths "
            f"({type(error).__name__}: {error}). Name another --target."
        ) from error


def _compared(target: Target) -> Conformance:
    for shapes in (Shapes(), Shapes(fixed=FALLBACK)):
        bench = _Bench(target, shapes)
        together = bench.run((0, 1, 2), _ANSWER, taken_back=True)
        alone = bench.run((1,), 1)
        if shapes.fixed is None and not target.multiplies_by_its_head:
            continue  # with some kernels these few tokens do not show it
        if _agree(together[1], alone[0]):
            divergence, distance = bench.divergence(together)
            _refuse_far(distance, together[0].logits.dtype)
            if shapes.fixed is None:
                shapes = replace(shapes, packed=_packs(target, bench, together))
            return Conformance(shapes, _digest(together), divergence)
    bench = _Bench(target, Shapes())
    once, again = (bench.run((1,), 1)[0] for _ in range(2))
    behind = bench.run((1,), 1, taken_back=True)[0]
    if _agree(once, again) and not _agree(once, behind):
        raise ModelError(
            "the target's passes depend on tokens that were taken back, so no draft could be "
            "rejected. Name another --target."
        )
    raise ModelError(
        "the target gives a sequence other bits beside others than alone, even in passes of one "
        "shape, so no answer of it could be repeated here. Name another --target or --dtype."
    )


def _packs(target: Target, bench: "_Bench", together: Sequence["_Found"]) -> bool:
    """Whether packed passes give the tokens that they run over the bits of whole ones."""
    if not device.is_cpu() or not target.make_cache(0, 0).may_pack:
        return False
    try:
        packed = bench.run((0, 1, 2), _ANSWER, taken_back=True, counts=_PACKED)
    except (*FAULTS, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    parts = (each.cut(count) for each, count in zip(packed, _PACKED, strict=True))
    return all(map(_agree, together, parts))


def _refuse_far(distance: float, dtype: mx.Dtype) -> None:
    most = _MOST_DISTANCE.get(dtype, max(_MOST_DISTANCE.values()))
    if not distance <= most:  # NaN is not near
        raise ModelError(
            f"the target's logits over slots of different lengths lie {distance:.2g} of their "
            f"spread from those of mlx-lm's own pass, expected {most:g} at most, so it would be "
            "decoded wrongly. Name another --target."
        )


class _Found(NamedTuple):
    """What one sequence got."""

    logits: mx.array  # [T, V], of the answer
    cached: Part  # of its tokens that stay

    def cut(self, count: int) -> "_Found":
        """Return what the first tokens of the answer got."""
        return self._replace(logits=self.logits[:count])


class _Bench:
    """Runs the same contents in passes of different shapes."""

    def __init__(self, target: Target, shapes: Shapes) -> None:
        self._target = target
        self._shapes = shapes
        self._passes = Passes(target, NoDrafter())
        self._vocab_size = target.facts.vocab_size

    def run(
        self,
        contents: Sequence[int],
        width: int,
        *,
        taken_back: bool = False,
        counts: Sequence[int] | None = None,
    ) -> list[_Found]:
        """Run some contents side by side, their answers in passes of a width.

        With `taken_back`, behind a step of other tokens of which none stays; with `counts`, over so
        many tokens of each content alone.
        """
        prompts = [self._ids(content, 0, _PROMPTS[content]) for content in contents]
        cache = self._filled(prompts).cache
        slots = self._shapes.slots_for(len(contents))
        lengths = [len(prompt) for prompt in prompts]
        room = max(lengths) + 2 * _ANSWER + (BLOCK if width == 1 else 0)
        cache.resize(list(range(len(contents))), slots, room)
        if taken_back:
            self._step(cache, contents, _ELSEWHERE, width, stay=0, counts=counts)
        starts = range(_STAY) if width == 1 else (0,)
        steps = [
            self._step(cache, contents, start, width, stay=_STAY, counts=counts) for start in starts
        ]
        found = mx.concatenate(steps, axis=1)
        return [
            _Found(found[slot], cache.snapshot(slot, length, length + _STAY))
            for slot, length in enumerate(lengths)
        ]

    def divergence(self, found: Sequence[_Found]) -> tuple[float, float]:
        """Say how far logits lie from those of mlx-lm's own pass over each content.

        Returns:
            The most of one logit; and how far a position's logits are, relative to their spread, in
            the middle of a content's positions and in the worst content. Rounding may send single
            tokens to other experts, which moves their position and no others.
        """
        most, worst = 0.0, 0.0
        for content, own in enumerate(found):
            ids = self._ids(content, 0, _PROMPTS[content] + _ANSWER)
            logits, _ = self._target.by_itself(mx.array([ids]))
            last, ours = (
                np.array(each.astype(mx.float32)) for each in (logits[0, -_ANSWER:], own.logits)
            )
            finite = np.isfinite(last)  # what is no number there may be none here
            with np.errstate(all="ignore"):
                apart = np.where(finite, np.abs(last - ours), 0)
                spread = np.where(finite, last, 0).std(axis=-1)
                distances = np.sqrt(np.square(apart).mean(axis=-1))
                distances = np.where(distances == 0, 0, distances / spread)
            most = max(most, float(apart.max()))
            worst = max(worst, float(np.sort(distances)[_ANSWER // 2]), key=_nan_last)
        return most, worst

    def _filled(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        asked = [*map(whole, prompts)]
        filling = prefill(self._passes, self._shapes, asked, PrefixCache(0))
        while True:
            try:
                next(filling)
            except StopIteration as through:
                return through.value

    def _step(
        self,
        cache: SlotCache,
        contents: Sequence[int],
        start: int,
        width: int,
        *,
        stay: int,
        counts: Sequence[int] | None,
    ) -> mx.array:
        """Run tokens of all contents, of which some stay; return logits, [contents, width, V]."""
        slots, wide = self._shapes.slots_for(len(contents)), self._shapes.width(width)
        tokens = np.zeros((slots, wide), dtype=np.int32)
        for slot, content in enumerate(contents):
            tokens[slot, :width] = self._ids(content, _PROMPTS[content] + start, width)
        logits, _ = self._passes.run(cache, mx.array(tokens), counts)
        kept = [min(width, stay)] * len(contents) + [0] * (slots - len(contents))
        cache.keep(mx.array(kept))
        mx.eval(logits, cache.arrays())
        return logits[: len(contents), :width]

    def _ids(self, content: int, start: int, count: int) -> list[int]:
        places = range(start, start + count)
        return [(7919 * content + 104729 * place) % self._vocab_size for place in places]


def _nan_last(distance: float) -> float:
    return math.inf if math.isnan(distance) else distance


def _agree(whole: _Found, beginning: _Found) -> bool:
    logits = whole.logits[: beginning.logits.shape[0]]
    cached = zip(whole.cached.arrays, beginning.cached.arrays, strict=True)
    return _bits(logits) == _bits(beginning.logits) and all(_bits(a) == _bits(b) for a, b in cached)


def _digest(found: Sequence[_Found]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for each in found:
        for array in (each.logits, *each.cached.arrays):
            digest.update(_bits(array))
    return digest.hexdigest()


def _bits(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()
