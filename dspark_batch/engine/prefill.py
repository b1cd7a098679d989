"""The prompt through the target, in chunks at absolute positions."""

from typing import NamedTuple

import mlx.core as mx

from dspark_batch.engine.cache import RaggedCache
from dspark_batch.engine.fallback import DrafterFault, extend
from dspark_batch.models.load import Pair

CHUNK = 256  # positions; a chunk begins at a multiple of it, whatever was cached before


class Prefilled(NamedTuple):
    """One prompt, ready to decode; the caches have a single slot."""

    cache: RaggedCache  # the target's
    context: RaggedCache  # the drafter's
    logits: mx.array  # [V], of the first token of the answer
    fallback: str | None  # why the drafter has no context; None: it has one


def prefill(pair: Pair, num_layers: tuple[int, int], prompt_ids: tuple[int, ...]) -> Prefilled:
    """Run a prompt through the target and its features into the drafter's context.

    Args:
        pair: target and drafter.
        num_layers: of the target's and of the drafter's cache.
        prompt_ids: at least one token.
    """
    cache, context = (RaggedCache(layers, slots=1) for layers in num_layers)
    cache.reserve(len(prompt_ids))
    context.reserve(len(prompt_ids))
    fallback = None
    for start in range(0, len(prompt_ids), CHUNK):
        tokens = mx.array([prompt_ids[start : start + CHUNK]])
        logits, features = pair.target(tokens, cache.layers)
        if fallback is None:
            fallback = _extended(pair, context, features)
        count = mx.array([tokens.shape[1]])
        cache.keep(count)
        context.keep(count)
        mx.eval(cache.arrays(), context.arrays())  # intermediate chunks need no logits
    return Prefilled(cache, context, logits[0, -1], fallback)


def _extended(pair: Pair, context: RaggedCache, features: mx.array | None) -> str | None:
    """Extend the drafter's context, and say why if that failed."""
    try:
        extend(pair.drafter, context, features)
    except DrafterFault as fault:
        return str(fault)
    return None
