"""Noise that is a function of (key, position, id): no generator, no state, no order."""

import mlx.core as mx

from dspark_batch import device

# What a single number of a position is for. They lie where no vocabulary reaches.
_DRAFT, _ACCEPT, _BONUS = 2**32 - 1, 2**32 - 2, 2**32 - 3


class Chance:
    """The noise of one round: each slot's own, by answer position.

    Args:
        keys: [B, 2] uint32, names the seed and the item of each slot.
        positions: [B] int32, how many answer tokens each slot has committed: the answer position
            that the first draft, and the target's first row, decide.
    """

    def __init__(self, keys: mx.array, positions: mx.array) -> None:
        self._keys = keys
        self._positions = positions

    def draft_uniform(self, k: int) -> mx.array:
        """Draw for block position k; [B] float32 in (0, 1), as all uniforms here."""
        return self._uniform(_DRAFT, mx.array([k]))[:, 0]

    def accept_uniforms(self, num_drafts: int) -> mx.array:
        """Draw for the acceptance of each draft, [B, num_drafts]."""
        return self._uniform(_ACCEPT, mx.arange(num_drafts))

    def bonus_uniform(self, accepted: mx.array) -> mx.array:
        """Draw for the token that follows the accepted drafts [B]; [B]."""
        return self._uniform(_BONUS, accepted[:, None])[:, 0]

    def perturb(
        self, logits: mx.array, ahead: int, slots: mx.array, ids: mx.array | None = None
    ) -> mx.array:
        """Add Gumbel noise to the logits of some slots; the others' stay bit for bit.

        Args:
            logits: [B, W, V] float32; row i decides answer position `positions + ahead + i`.
            ahead: see above.
            slots: [B] bool, which get noise.
            ids: [V], the tokens, where these V are not a whole vocabulary: a token has its noise.
        """
        ids = mx.arange(logits.shape[-1]) if ids is None else ids
        positions = self._positions[:, None] + mx.arange(ahead, ahead + logits.shape[1])
        add = _perturbed if device.is_cpu() else _perturbed_fused
        return add(
            logits, self._keys[:, None, None], positions[..., None], slots, ids.astype(mx.uint32)
        )

    def _uniform(self, use: int, ahead: mx.array) -> mx.array:
        positions = self._positions[:, None] + ahead
        bits = random_bits(self._keys[:, None], positions, mx.array(use, dtype=mx.uint32))
        return uniform(bits)


def random_bits(keys: mx.array, positions: mx.array, ids: mx.array) -> mx.array:
    """Hash to 32 random bits, element by element, so neither shape nor order matters.

    Args:
        keys: [..., 2] uint32; its other axes broadcast with the rest.
        positions: [...] int32.
        ids: [...] uint32.

    Returns:
        [...] uint32, the same on every device: integers only.
    """
    place = positions.astype(mx.uint32)
    # Two words of state: 32 bits would let the noise of two positions meet by accident.
    first = _mix(keys[..., 0] ^ _mix(place))
    second = _mix(keys[..., 1] + _mix(~place))
    return _mix(_mix(ids * 0x9E3779B9 + first) ^ second)


def uniform(bits: mx.array) -> mx.array:
    """Map random bits to float32 in (0, 1): 2^23 values, each exact and none at an end."""
    return ((bits >> 8) | 1).astype(mx.float32) * 2**-24


def gumbel(bits: mx.array) -> mx.array:
    """Map random bits to standard Gumbel noise, float32 and finite.

    All 32 bits count where the noise is large: 24 would make a token of probability 1e-8 three
    times too rare.
    """
    u = mx.minimum((bits | 1).astype(mx.float32) * 2**-32, 1 - 2**-24)
    return -mx.log(-mx.log1p(-u))


def _perturbed(
    logits: mx.array, keys: mx.array, positions: mx.array, slots: mx.array, ids: mx.array
) -> mx.array:
    noisy = logits + gumbel(random_bits(keys, positions, ids))
    return mx.where(slots[:, None, None], noisy, logits)


# One pass over the vocabulary instead of thirty. Not on a CPU: there the passes are cheap, and
# the first compilation takes 10 seconds.
_perturbed_fused = mx.compile(_perturbed)


def _mix(x: mx.array) -> mx.array:
    """Scramble 32 bits, one to one.

    Source:
        lowbias32, Chris Wellons, "Prospecting for hash functions" (public domain).
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
