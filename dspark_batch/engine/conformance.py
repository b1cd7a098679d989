"""Whether a target gives the same bits in passes of any shape, and which bits these are."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import Prefilled, prefill
from dspark_batch.engine.prefix_cache import PrefixCache
from dspark_batch.engine.shapes import FALLBACK, Shapes
from dspark_batch.errors import ModelError
from dspark_batch.models.plain import NoDrafter
from dspark_batch.models.target import Target
from dspark_batch.numerics.rows import as_they_come

_PROMPTS = (3, 21, 40)  # tokens of the prompts
_ANSWER = 8  # tokens behind each of them


class Conformance(NamedTuple):
    """What a target's passes give on this device."""

    shapes: Shapes
    numerics: str  # names the bits
    divergence: float  # of a logit at most, from mlx-lm's own pass


def conformance(target: Target) -> Conformance:
    """Run a few tokens through a target in passes of different shapes, and compare the bits.

    All slots at once and eight tokens wide, one slot alone and token by token, a prompt alone and
    with others: logits, keys and values must be equal. If they are not, although every product
    runs over safe rows, the target has an operation whose bits depend on the shape of a pass. Then
    all of its passes have one shape.

    Raises:
        ModelError: not even then the bits are equal.
    """
    for shapes in (Shapes(), Shapes(fixed=FALLBACK)):
        bench = _Bench(target, shapes)
        together = bench.run((0, 1, 2), _ANSWER)
        alone = bench.run((1,), 1)
        if _agree(together[1], alone[0]):
            numerics = _digest(together)
            return Conformance(shapes, numerics, bench.divergence(together))
    raise ModelError(
        "the target gives a sequence other bits beside others than alone, even in passes of one "
        "shape, so no answer of it could be repeated here. Name another --target or --dtype."
    )


class _Found(NamedTuple):
    """What one sequence got."""

    logits: mx.array  # [T, V], of the answer
    cached: list[mx.array]  # of the answer's positions


class _Bench:
    """Runs the same contents in passes of different shapes."""

    def __init__(self, target: Target, shapes: Shapes) -> None:
        self._target = target
        self._shapes = shapes
        self._passes = Passes(target, NoDrafter())
        self._vocab_size = target.facts.vocab_size

    def run(self, contents: Sequence[int], width: int) -> list[_Found]:
        """Run some contents side by side, their answers in passes of a width."""
        prompts = [self._ids(content, 0, _PROMPTS[content]) for content in contents]
        cache = self._filled(prompts).cache
        slots = self._shapes.slots_for(len(contents))
        lengths = [len(prompt) for prompt in prompts]
        cache.resize(list(range(len(contents))), slots, max(lengths) + 2 * _ANSWER)
        logits = []
        for start in range(0, 2 if width == 1 else _ANSWER, width):
            logits.append(self._step(cache, contents, start, width))
        found = mx.concatenate(logits, axis=1)
        num_tokens = found.shape[1]
        return [
            _Found(found[slot], cache.part(slot, length, length + num_tokens))
            for slot, length in enumerate(lengths)
        ]

    def divergence(self, found: Sequence[_Found]) -> float:
        """Say how far logits lie from those of mlx-lm's own pass over each content."""
        distance = 0.0
        for content, own in enumerate(found):
            ids = self._ids(content, 0, _PROMPTS[content] + _ANSWER)
            with as_they_come():
                logits = self._target.model(
                    mx.array([ids]), cache=make_prompt_cache(self._target.model)
                )
                self._target.forget()
                last = logits[0, -_ANSWER:]
            distance = max(distance, mx.abs(last - own.logits).max().item())
        return distance

    def _filled(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        filling = prefill(self._passes, self._shapes, prompts, PrefixCache(0))
        while True:
            try:
                next(filling)
            except StopIteration as through:
                return through.value

    def _step(self, cache: object, contents: Sequence[int], start: int, width: int) -> mx.array:
        """Run tokens of all contents; return their logits, [contents, width, V]."""
        slots, wide = self._shapes.slots_for(len(contents)), self._shapes.width(width)
        tokens = np.zeros((slots, wide), dtype=np.int32)
        for slot, content in enumerate(contents):
            tokens[slot, :width] = self._ids(content, _PROMPTS[content] + start, width)
        logits, _ = self._passes.run(cache, mx.array(tokens))
        counts = [width] * len(contents) + [0] * (slots - len(contents))
        cache.keep(mx.array(counts))
        mx.eval(logits, cache.arrays())
        return logits[: len(contents), :width]

    def _ids(self, content: int, start: int, count: int) -> list[int]:
        places = range(start, start + count)
        return [(7919 * content + 104729 * place) % self._vocab_size for place in places]


def _agree(whole: _Found, beginning: _Found) -> bool:
    num_tokens = beginning.logits.shape[0]
    cached = zip(whole.cached, beginning.cached, strict=True)
    return _bits(whole.logits[:num_tokens]) == _bits(beginning.logits) and all(
        _bits(a[:, :num_tokens]) == _bits(b) for a, b in cached
    )


def _digest(found: Sequence[_Found]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for each in found:
        for array in (each.logits, *each.cached):
            digest.update(_bits(array))
    return digest.hexdigest()


def _bits(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()
