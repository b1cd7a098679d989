"""From logits to the distribution that is sampled, and a token out of it."""

from typing import NamedTuple

import mlx.core as mx

from dspark_batch import device

_LEAST = 1e-37  # a float32 above 0, so that the likeliest token stays, however little is asked for


class Filters(NamedTuple):
    """Which tokens each slot may say; [B] each."""

    top_k: mx.array  # int32; 0: all
    top_p: mx.array  # float32 in (0, 1]
    min_p: mx.array  # float32 in [0, 1]


class Settings(NamedTuple):
    """How each slot samples."""

    temperature: mx.array  # [B] float32; 0: the most likely token
    filters: Filters | None = None  # None: no slot has any

    @property
    def is_sampled(self) -> mx.array:
        """Tell the slots [B] with a temperature from the greedy ones."""
        return self.temperature > 0


def are_finite(logits: mx.array) -> mx.array:
    """Tell where all logits [..., V] are numbers, [...]; the largest and the least carry a NaN."""
    if device.is_cpu():
        return (mx.abs(logits) < mx.inf).all(axis=-1)
    return mx.maximum(logits.max(axis=-1), -logits.min(axis=-1)) < mx.inf  # writes no array of V


def scaled_logits(logits: mx.array, settings: Settings) -> mx.array:
    """Apply temperature and filters; a greedy slot keeps its logits, as float32.

    The temperature comes first, then min-p, top-k, top-p, each on what the one before left, as in
    vLLM (mlx-lm filters first and divides by the temperature last). Filters cut by value, so
    tokens as likely as the last one that stays, stay too.

    Args:
        logits: [B, W, V].
        settings: of the B slots.

    Returns:
        [B, W, V] float32, -inf for what may not be said.
    """
    divisor = mx.where(settings.is_sampled, settings.temperature, 1.0)
    scaled = logits.astype(mx.float32) / divisor[:, None, None]
    if settings.filters is None:
        return scaled
    floor = mx.where(settings.is_sampled[:, None], _floor(scaled, settings.filters), -mx.inf)
    return mx.where(scaled >= floor[..., None], scaled, -mx.inf)


def probabilities(logits: mx.array, settings: Settings) -> mx.array:
    """Give the distribution that is sampled, [B, W, V] float32; one-hot for a greedy slot."""
    sampled = mx.softmax(scaled_logits(logits, settings), axis=-1)
    best = mx.argmax(logits, axis=-1, keepdims=True)
    greedy = (mx.arange(logits.shape[-1]) == best).astype(mx.float32)
    return mx.where(settings.is_sampled[:, None, None], sampled, greedy)


def draw(weights: mx.array, uniform: mx.array) -> mx.array:
    """Draw the first token whose cumulative weight exceeds a uniform share of the whole.

    Args:
        weights: [..., V] float32, not negative; they need not add up to 1.
        uniform: [...] in [0, 1).

    Returns:
        [...] int32, never a token of weight 0 while another has more.
    """
    # A parallel scan may dip in its last bits, which must let no token of weight 0 in.
    cumulative = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0.0)
    # Rounded up to the whole, the share would be exceeded nowhere.
    share = mx.minimum(uniform, 1 - 2**-23) * cumulative.max(axis=-1)
    return mx.argmax(cumulative > share[..., None], axis=-1).astype(mx.int32)


def _floor(scaled: mx.array, filters: Filters) -> mx.array:
    """Find the least logit [B, W] that passes min-p, top-k and top-p."""
    top_k, top_p, min_p = (f[:, None, None] for f in filters)
    ordered = -mx.sort(-scaled, axis=-1)
    last = mx.where(top_k > 0, mx.minimum(top_k, scaled.shape[-1]), scaled.shape[-1]) - 1
    last = mx.broadcast_to(last, (*scaled.shape[:2], 1))
    floor = mx.maximum(ordered[..., :1] + mx.log(min_p), mx.take_along_axis(ordered, last, axis=-1))
    left = mx.where(ordered >= floor, ordered, -mx.inf)
    mass = mx.softmax(left, axis=-1)
    before = mx.cumsum(mass, axis=-1) - mass
    # 1 is no filter, although rounded masses reach it before the last token.
    kept = (before < mx.maximum(top_p, _LEAST)) | (top_p >= 1)
    nucleus = mx.where(kept, left, mx.inf).min(axis=-1)
    return mx.maximum(floor[..., 0], nucleus)
