"""The passes of a round, each one compiled into a single function where that pays."""

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx

from dspark_batch.engine.cache import RaggedCache
from dspark_batch.models.dspark import Draft, DSparkDrafter
from dspark_batch.models.plain import NoDrafter
from dspark_batch.models.target import Target
from dspark_batch.numerics.rules import Greedy, Rule

Arrays: TypeAlias = tuple[mx.array | None, ...]
OverCache: TypeAlias = Callable[[RaggedCache, mx.array], Arrays]  # writes the cache


class Passes:
    """A pair's passes over ragged caches.

    On a GPU each one is compiled with the buffers as arguments and results: one graph instead of
    some thousand launches that the host prepares anew. On a CPU compilation takes 10 seconds and
    gains nothing. Bits may differ between the two, so a device has one way.
    """

    def __init__(self, target: Target, drafter: DSparkDrafter | NoDrafter) -> None:
        self._drafter = drafter
        self._is_compiled = mx.default_device() != mx.Device(mx.cpu)
        self._verify = self._made(lambda cache, tokens: target(tokens, cache.layers))
        self._extend = self._made(_extending(drafter))
        self._greedy: dict[int, OverCache] = {}  # number of drafts -> pass

    def verify(self, cache: RaggedCache, tokens: mx.array) -> tuple[mx.array, mx.array | None]:
        """Run tokens [S, W] through the target; see `Target`."""
        return self._verify(cache, tokens)

    def extend(self, context: RaggedCache, features: mx.array | None) -> None:
        """Write features behind the drafter's context; see `DSparkDrafter.extend`."""
        if features is not None:
            self._extend(context, features)

    def propose(
        self, context: RaggedCache, anchors: mx.array, num_drafts: int, rule: Rule
    ) -> Draft:
        """Draft from the anchors [S]; see `DSparkDrafter.propose`."""
        if not self._is_compiled or not isinstance(rule, Greedy):  # noise is another each round
            return self._drafter.propose(anchors, context, num_drafts, rule.draft)
        if num_drafts not in self._greedy:
            self._greedy[num_drafts] = self._made(_proposing(self._drafter, num_drafts))
        return Draft(*self._greedy[num_drafts](context, anchors))

    def _made(self, over: OverCache) -> OverCache:
        return _compiled(over) if self._is_compiled else over


def _extending(drafter: DSparkDrafter | NoDrafter) -> OverCache:
    def over(context: RaggedCache, features: mx.array) -> Arrays:
        drafter.extend(context, features)
        return ()

    return over


def _proposing(drafter: DSparkDrafter, num_drafts: int) -> OverCache:
    def over(context: RaggedCache, anchors: mx.array) -> Arrays:
        return drafter.propose(anchors, context, num_drafts, Greedy().draft)

    return over


def _compiled(over: OverCache) -> OverCache:
    """Compile a pass; the cache's buffers go in and out, and are written in place."""
    present: list[bool] = []  # which results there are; told when the pass is traced

    def pure(
        tokens: mx.array, lengths: mx.array, buffers: list[mx.array], folds: bool
    ) -> tuple[list[mx.array], list[mx.array]]:
        cache = RaggedCache.of(lengths, buffers, folds=folds)
        results = over(cache, tokens)
        present[:] = [result is not None for result in results]
        return [result for result in results if result is not None], cache.buffers()

    run = mx.compile(pure)

    def compiled(cache: RaggedCache, tokens: mx.array) -> Arrays:
        results, buffers = run(tokens, cache.lengths, cache.buffers(), cache.folds)
        cache.replace(buffers)  # nobody else holds the old ones, so none is copied
        left = iter(results)
        return tuple(next(left) if is_there else None for is_there in present)

    return compiled
