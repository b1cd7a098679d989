"""Measures this machine: which passes give the same bits, and how long each one takes."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dspark_batch.engine.cache import RaggedCache
from dspark_batch.engine.machine import Machine
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.scheduler import DrafterPass, StepCurve, TargetPass, best_plan
from dspark_batch.engine.shapes import Shape, Shapes
from dspark_batch.models.dspark import DSparkDrafter
from dspark_batch.models.plain import NoDrafter
from dspark_batch.models.target import Target
from dspark_batch.numerics.rules import Greedy

_BLOCK = 8  # tokens of a round that a class must be able to verify

_PROMPT = 32  # tokens: of prompts that are compared, and before answers that are
_ANSWER = 4  # tokens of answers that are compared
_CONTENTS = 4  # slots that are compared, if there are so many
_LEAST_S = 0.06  # in the passes of one shape, if not
_MOST = 12  # passes
_TIMES = 4  # that a drafter is timed, the warm-up included
_LONG_S = 0.4  # a pass that takes longer has enough slots
_TIMINGS = 3  # of each pass of the class; a busy moment of the machine must not decide

# Seconds since it began, after which a slow or busy machine begins no more of a part.
_MOST_CAPACITIES_S, _MOST_ROUNDS_S, _MOST_TIMINGS_S, _MOST_PREFILL_S = 12.0, 26.0, 36.0, 48.0

_PRIOR = tuple(0.8**k for k in range(1, _BLOCK))  # survival, for any drafter
_DRAFTER_SHARE = 0.2  # of a target pass, for any drafter
_FAST = 0.7  # of the best plan's speed: enough for a class with more passes
_SAME_SPEED = 0.95  # of the masked kernel's time: folding is worth it, or as good


class Limits(NamedTuple):
    """What is tried on a device."""

    slots: tuple[int, ...]  # of a round
    widths: tuple[int, ...]  # of a round; for every drafter the same, so none changes the class
    prompts: tuple[int, ...]  # of a prefill pass
    lengths: tuple[int, ...]  # width of a prefill pass
    capacities: tuple[int, ...]  # of the caches' buffers
    most_positions: int | None = None  # that a cache may hold; None: any number


def default_limits() -> Limits:
    """Say what is worth trying here: a CPU gains little by many slots, a GPU much."""
    if mx.default_device() == mx.Device(mx.cpu):
        slots, lengths = (1, 2, 4, 8, 16, 32), (16, 24, 32, 40, 48, 56, 64)
        return Limits(slots, (1, 2, 4, 8), (1, 2, 4), lengths, (64, 128, 256, 512))
    return Limits(
        slots=(1, 2, 4, 8, 16, 32, 64, 128),
        widths=(1, 2, 4, 8, 16),
        prompts=(1, 2, 4, 8, 16),
        lengths=(16, 32, 64, 128, 256),
        capacities=(256, 512, 1024, 2048),
    )


def probe(target: Target, limits: Limits, now: Callable[[], float] = time.perf_counter) -> Machine:
    """Find the shape class of a target on this device, and what its passes cost.

    Two passes are alike if some slots get the same bits from both, logits as well as cached keys
    and values: wherever they lie among other slots, and whether token by token or several at once.
    The class is the likeness that can verify whole blocks and allows the fastest plan, or nearly
    so with more passes. It depends on the target only, so that no drafter changes an answer.

    On a slow or busy machine the most useful passes are measured, for a minute or so; whole blocks
    can be verified by any class.

    Args:
        target: whose passes they are.
        limits: what is tried.
        now: seconds.

    Source:
        DESIGN.md, section 4.
    """
    bench = _Bench(target, now)
    folds = _is_faster_folded(bench, limits)
    capacity = _least_capacity(bench, limits, folds)
    found = _rounds(bench, limits, capacity, folds)
    chosen = _best(_alike(found))
    others = [each for each in found if each not in chosen]
    seconds = _timed_again(bench, chosen, capacity, folds)
    return Machine(
        Shapes(
            steps=tuple(each.shape for each in chosen),
            prefill=_prefill_class(bench, limits, capacity),
            least_capacity=capacity,
            folds=folds,
        ),
        chosen[0].bits[0],
        tuple(TargetPass(*e.shape, s) for e, s in zip(chosen, seconds, strict=True)),
        tuple(each.timed for each in others),
        max((_distance(chosen[0], each) for each in others), default=0.0),
    )


def numerics(target: Target, shapes: Shapes) -> str:
    """Name the bits that a class has on this device, as `probe` did."""
    found = _Bench(target).round(shapes.steps[0], shapes.least_capacity, folds=shapes.folds)
    return found.bits[0]


def time_drafter(
    target: Target, drafter: DSparkDrafter, slots: Sequence[int]
) -> tuple[DrafterPass, ...]:
    """Measure what a drafter's two passes of a round take, by slots, until they take long."""
    found: list[DrafterPass] = []
    for count in sorted(slots):
        if not found or found[-1].seconds <= _LONG_S:
            found.append(DrafterPass(count, _drafter_s(target, drafter, count)))
    return tuple(found)


class _Found(NamedTuple):
    """One measured pass."""

    shape: Shape
    seconds: float
    bits: tuple[str, ...]  # a digest for each compared slot
    logits: np.ndarray  # of the first compared slot, [_ANSWER, V] float32

    @property
    def timed(self) -> TargetPass:
        """What the scheduler reads."""
        return TargetPass(*self.shape, self.seconds)

    def is_like(self, other: "_Found") -> bool:
        """Whether both have the same bits in the slots that both have."""
        return all(a == b for a, b in zip(self.bits, other.bits, strict=False))


class _Bench:
    """Runs the same few contents in passes of any shape."""

    def __init__(self, target: Target, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._began = now()
        self._target = target
        self._passes = Passes(target, NoDrafter())
        self._vocab_size = self._pass(mx.array([[0]]), self._cache(1, 1)).shape[-1]
        self._prompt = self._cache(1, _PROMPT)
        self._pass(mx.array([self._ids(0, 0, _PROMPT)]), self._prompt)

    def is_over(self, most_s: float) -> bool:
        """Whether it has been at work for longer."""
        return self._now() - self._began > most_s

    def round(self, shape: Shape, capacity: int, *, folds: bool) -> _Found:
        """Decode some tokens behind prompts of different lengths, and time the passes."""
        slots, width = shape
        contents = _contents(slots)
        lengths = [_PROMPT - 3 * content for content in contents]
        cache = self._cache(slots, capacity, folds=folds)
        cache.begin_with([[self._prompt.part(0, 0, length)] for length in lengths], lengths)
        least = max(2, -(-_ANSWER // width))
        logits, seconds = self._chain(contents, width, cache, least, _LEAST_S)
        where = [contents.index(content) for content in range(min(slots, _CONTENTS))]
        bits = [
            _digest(logits[s, :_ANSWER], *cache.part(s, lengths[s], lengths[s] + _ANSWER))
            for s in where
        ]
        first = np.array(logits[where[0], :_ANSWER].astype(mx.float32))
        return _Found(shape, min(seconds[1:]), tuple(bits), first)  # the first is the warm-up

    def prompts(self, shape: Shape, capacity: int) -> _Found:
        """Run prompts through in passes of one shape."""
        slots, width = shape
        contents = _contents(slots)
        cache = self._cache(slots, max(capacity, 2 * _PROMPT, 2 * width))
        logits, _ = self._chain(contents, width, cache, -(-_PROMPT // width))
        where = [contents.index(content) for content in range(min(slots, _CONTENTS))]
        bits = [_digest(logits[s, :_PROMPT], *cache.part(s, 0, _PROMPT)) for s in where]
        return _Found(shape, 0.0, tuple(bits), np.zeros(0))

    def _chain(
        self,
        contents: Sequence[int],
        width: int,
        cache: RaggedCache,
        least: int,
        least_s: float = 0,
    ) -> tuple[mx.array, list[float]]:
        """Run passes of a width; return their logits [S, T, V], and each pass's seconds."""
        logits, seconds = [], []
        most = min(_MOST, (cache.capacity - _PROMPT) // width)
        while len(seconds) < least or (sum(seconds[1:]) < least_s and len(seconds) < most):
            start = len(seconds) * width
            tokens = mx.array([self._ids(1 + c, start, width) for c in contents])
            began = self._now()
            logits.append(self._pass(tokens, cache))
            seconds.append(self._now() - began)
        return mx.concatenate(logits, axis=1), seconds

    def _pass(self, tokens: mx.array, cache: RaggedCache) -> mx.array:
        logits, _ = self._passes.run(cache, tokens)
        cache.keep(mx.full(tokens.shape[:1], tokens.shape[1], dtype=mx.int32))
        mx.eval(logits, cache.arrays())
        return logits

    def _cache(self, slots: int, capacity: int, *, folds: bool = False) -> RaggedCache:
        cache = RaggedCache(self._target.num_caches, slots, folds=folds)
        cache.reserve(capacity)
        return cache

    def _ids(self, content: int, start: int, count: int) -> list[int]:
        places = range(start, start + count)
        return [(7919 * content + 104729 * place) % self._vocab_size for place in places]


def _contents(slots: int) -> list[int]:
    """Give each slot a content; the compared ones lie elsewhere in every number of slots."""
    places = dict.fromkeys([slots - 1, 0, slots // 2, slots // 3])
    contents = dict(zip(places, range(_CONTENTS), strict=False))
    return [contents.get(slot, _CONTENTS + slot % 3) for slot in range(slots)]


def _digest(*arrays: mx.array) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()


def _rounds(bench: _Bench, limits: Limits, capacity: int, folds: bool) -> list[_Found]:
    """Measure passes of all widths; that of whole blocks first, no class is without it."""
    found: list[_Found] = []
    for width in sorted(limits.widths, key=lambda width: width != _BLOCK):
        if not found or not bench.is_over(_MOST_ROUNDS_S):
            found += _grown(bench, width, limits, capacity, folds)
    return sorted(found, key=lambda each: (each.shape[1], each.shape[0]))


def _timed_again(
    bench: _Bench, chosen: Sequence[_Found], capacity: int, folds: bool
) -> list[float]:
    """Give the least seconds of several timings."""
    seconds = [each.seconds for each in chosen]
    for _ in range(_TIMINGS):
        for index, each in enumerate(chosen):
            if bench.is_over(_MOST_TIMINGS_S):
                return seconds
            again = bench.round(each.shape, capacity, folds=folds)
            seconds[index] = min(seconds[index], again.seconds)
    return seconds


def _grown(
    bench: _Bench, width: int, limits: Limits, capacity: int, folds: bool
) -> Iterator[_Found]:
    """Measure a width over more and more slots, until a pass takes long, or too much time is gone.

    Whole blocks are measured in any case: what they leave out, no job can have.
    """
    for slots in limits.slots:
        if limits.most_positions is not None and slots * capacity > limits.most_positions:
            return
        found = bench.round((slots, width), capacity, folds=folds)
        if found.seconds > _LONG_S:  # unless the machine was busy, or asleep
            found = min(found, bench.round(found.shape, capacity, folds=folds), key=_seconds)
        yield found
        if found.seconds > _LONG_S or (width != _BLOCK and bench.is_over(_MOST_ROUNDS_S)):
            return


def _seconds(found: _Found) -> float:
    return found.seconds


def _alike(found: Sequence[_Found]) -> list[list[_Found]]:
    """Group what is alike; a pass that agrees with a group in part only is alone."""
    groups: list[list[_Found]] = []
    for each in found:
        group = next((g for g in groups if all(each.is_like(other) for other in g)), None)
        if group is None:
            groups.append([each])
        else:
            group.append(each)
    return groups


def _best(groups: Sequence[list[_Found]]) -> list[_Found]:
    """Choose the largest of the groups that verify whole blocks almost as fast as any."""
    groups = [g for g in groups if any(each.shape[1] >= _BLOCK for each in g)]
    rates = [_rate(group) for group in groups]
    fast = [g for g, rate in zip(groups, rates, strict=True) if rate >= _FAST * max(rates)]
    return max(fast, key=len)


def _rate(group: Sequence[_Found]) -> float:
    """Expect the tokens per second of the best plan, with a drafter like many."""
    least: dict[int, float] = {}
    for each in group:
        slots = each.shape[0]
        least[slots] = min(each.seconds, least.get(slots, each.seconds))
    drafter = [DrafterPass(slots, _DRAFTER_SHARE * seconds) for slots, seconds in least.items()]
    curve = StepCurve(tuple(each.timed for each in group), tuple(drafter))
    return best_plan(curve, _PRIOR).tokens_per_s


def _distance(one: _Found, other: _Found) -> float:
    return float(np.abs(one.logits - other.logits).max())


def _is_faster_folded(bench: _Bench, limits: Limits) -> bool:
    shape = (limits.slots[len(limits.slots) // 2], _BLOCK)
    room = limits.capacities[-1]
    stock, folded = (bench.round(shape, room, folds=folds).seconds for folds in (False, True))
    # Where both are as fast, folding: on CPUs it leaves more passes alike.
    return _SAME_SPEED * folded < stock


def _least_capacity(bench: _Bench, limits: Limits, folds: bool) -> int:
    """Find the least room from which on more of it changes no bit."""
    shape = (limits.slots[len(limits.slots) // 2 - 1], _BLOCK)
    least = limits.capacities[-1]
    last = [bench.round(shape, least, folds=folds), bench.prompts((1, _PROMPT), least)]
    for capacity in reversed(limits.capacities[:-1]):
        if bench.is_over(_MOST_CAPACITIES_S):
            break
        found = [bench.round(shape, capacity, folds=folds), bench.prompts((1, _PROMPT), capacity)]
        if not all(a.is_like(b) for a, b in zip(found, last, strict=True)):
            break
        least = capacity
    return least


def _prefill_class(bench: _Bench, limits: Limits, capacity: int) -> tuple[Shape, ...]:
    """Choose the likeness with the most passes; it need not be that of the rounds."""
    found: list[_Found] = []
    for width in limits.lengths:  # the cheap ones first, over any number of prompts
        for prompts in limits.prompts:
            if not found or not bench.is_over(_MOST_PREFILL_S):
                found.append(bench.prompts((prompts, width), capacity))
    groups = _alike(sorted(found, key=lambda each: each.shape))
    return tuple(each.shape for each in max(groups, key=len))


def _drafter_s(target: Target, drafter: DSparkDrafter, slots: int) -> float:
    cache, context = RaggedCache(target.num_caches, slots), RaggedCache(drafter.num_layers, slots)
    for each in (cache, context):
        each.reserve(1 + drafter.block_size)
    passes, anchors = Passes(target, drafter), mx.zeros(slots, dtype=mx.int32)
    _, features = passes.run(cache, anchors[:, None])
    mx.eval(features)
    seconds = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        passes.extend(context, features)
        proposed = passes.propose(context, anchors, drafter.block_size, Greedy())
        mx.eval(proposed.tokens, context.arrays())
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
