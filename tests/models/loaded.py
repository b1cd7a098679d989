"""What a loaded pair computes, to compare pairs by."""

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from dspark_batch.engine.engine import Engine
from dspark_batch.types import Item, Request


def computed(pair):
    """What target and drafter make of a few tokens, the drafter without context."""
    tokens = mx.array([[5, 9, 33, 2]])
    drafter = pair.drafter
    caches = [KVCache() for _ in range(drafter.num_layers)]
    block = drafter.block_hidden(tokens, caches, mx.array([[3]]), None)
    return pair.target.model(tokens), drafter.base_logits(block)


def answer(pair):
    request = Request(Item(0, "0", "d", "t:1"), (5, 9, 33, 2), 6)
    (completion,) = Engine(pair).generate([request])
    return completion.token_ids
