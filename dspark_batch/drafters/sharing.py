"""Lets a drafter use the target's embedding and head where its own copies are the same bits."""

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.models.target import embedding_of, head_of, text_model


def share_ends(drafter: DSparkDrafter, model: nn.Module) -> None:
    """Drop the drafter's copies of the target's embedding and head, each only if it is exact.

    A drafter of DeepSpec stores both, copied from its target. Equal bits in equal types make equal
    logits, so a quantised target, or one that was trained further, shares nothing.

    Args:
        drafter: computes in its final type, and is not quantised yet.
        model: the target, in its final form.
    """
    config = drafter.config
    if config.tied:
        return
    text = text_model(model)
    embedding, head = embedding_of(text), head_of(text)
    drafter.borrow(
        embedding=config.own_embedding and _same(drafter.embed_tokens, embedding, nn.Embedding),
        head=config.own_head and _same(drafter.lm_head, head, nn.Linear, nn.Embedding),
    )


def _same(own: nn.Module, its: nn.Module, *kinds: type[nn.Module]) -> bool:
    if type(its) not in kinds or "bias" in its or "scales" in own:
        return False
    mine, theirs = own.weight, its.weight
    return mine.dtype == theirs.dtype and bool(mx.array_equal(mine, theirs).item())
