"""Which cached positions a step may look at; True means visible."""

import mlx.core as mx


def ragged_causal(
    lengths: mx.array, width: int, capacity: int, window: int | None = None
) -> mx.array:
    """Mask a step of `width` tokens whose slots hold different numbers of cached tokens.

    Args:
        lengths: [B] int32, cached tokens of each slot before the step.
        width: tokens per slot in this step; token i of slot b sits at lengths[b] + i.
        capacity: positions in the KV buffer.
        window: how many positions a token sees, itself included; None for all.

    Returns:
        [B, 1, width, capacity] bool.
    """
    position = (lengths[:, None] + mx.arange(width))[:, None, :, None]
    key = mx.arange(capacity)
    visible = key <= position
    return visible if window is None else visible & (key > position - window)


def ragged_block(lengths: mx.array, width: int, capacity: int) -> mx.array:
    """Mask a draft block: every slot of the block sees all context and the whole block.

    Args:
        lengths: [B] int32, context positions of each slot; the block sits right behind them.
        width: slots of the block.
        capacity: positions in the KV buffer.

    Returns:
        [B, 1, 1, capacity] bool.

    Source:
        DSpark, eq. 3: attention in the block is bidirectional.
    """
    return mx.arange(capacity) < (lengths + width)[:, None, None, None]
