"""How clear the target's choice of one answer token is."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from dspark_batch.answers.sampling import noise_key
from dspark_batch.answers.steering import Answer, steering_of, wish_of
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import prefill_alone
from dspark_batch.engine.shapes import Shapes
from dspark_batch.numerics.chance import Chance
from dspark_batch.numerics.sampling import Filters, Settings, scaled_logits
from dspark_batch.pair import Pair
from dspark_batch.types import Request


def margins(
    pair: Pair, request: Request, answer: Sequence[int], tokens: tuple[int, int]
) -> tuple[float, float]:
    """Measure the choice of the token that follows an answer, in a pass of its own.

    For a sampled request the logits are those that decide: scaled, filtered, with the noise of
    the item and the position.

    Args:
        pair: whose target chooses.
        request: what was asked.
        answer: the tokens before the position.
        tokens: two that were chosen there; an id outside the vocabulary lies infinitely far.

    Returns:
        What the likeliest token has before the second, and before the less likely of `tokens`.
    """
    passes = Passes(pair.target, NoDrafter())
    logits = prefill_alone(passes, Shapes(), (*request.prompt_ids, *answer)).logits[0]
    wish = wish_of(pair, request)
    if wish is not None:
        nothing = mx.zeros((1, 0), dtype=mx.int32)
        logits = steering_of([Answer(wish, answer)])(logits[None, None], nothing)[0, 0]
    deciding = _deciding(logits, request, len(answer))
    two: Any = mx.topk(deciding, 2).tolist()
    second, first = two
    chosen: list[Any] = [
        deciding[t].item() if 0 <= t < deciding.shape[0] else -mx.inf for t in tokens
    ]
    return abs(first - second), max(first, second) - min(chosen)


def _deciding(logits: mx.array, request: Request, position: int) -> mx.array:
    """Make of logits [V] those whose argmax is the token at an answer position."""
    sampling = request.sampling
    if sampling.is_greedy:
        return logits.astype(mx.float32)
    filters = Filters(*(mx.array([v]) for v in (sampling.top_k, sampling.top_p, sampling.min_p)))
    settings = Settings(mx.array([sampling.temperature]), filters)
    chance = Chance(mx.array([noise_key(request)], dtype=mx.uint32), mx.array([position]))
    scaled = scaled_logits(logits[None, None], settings)
    return chance.perturb(scaled, 0, settings.is_sampled)[0, 0]
