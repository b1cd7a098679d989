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


def windowed_block(
    lengths: mx.array,
    width: int,
    capacity: int,
    *,
    window: int | None,
    from_anchor: bool,
    causal: bool,
) -> mx.array:
    """Mask a draft block that sees only the end of its context, or of itself the own past.

    Args:
        lengths: [B] int32, context positions of each slot; the block sits right behind them.
        width: slots of the block.
        capacity: positions in the KV buffer.
        window: context positions back from a slot, itself included; None for all.
        from_anchor: count the window back from the anchor, itself not included, for all slots.
        causal: a slot sees the block only up to itself.

    Returns:
        [B, 1, width, capacity] bool, or [B, 1, 1, capacity] where all slots see alike.

    Source:
        z-lab's DFlash and, with `from_anchor`, vLLM's speculators.
    """
    anchor = lengths[:, None, None, None]
    query = anchor + mx.arange(width)[:, None]
    key = mx.arange(capacity)
    block = (key >= anchor) & (key <= (query if causal else anchor + width - 1))
    context = key < anchor
    if window is not None:
        context = context & (key >= (anchor - window if from_anchor else query - window + 1))
    return context | block
