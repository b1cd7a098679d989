"""The step of a drafter's training: draw anchors, ask the target, draft, compare."""

from collections.abc import Callable

import mlx.core as mx

from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.train.blocks import (
    Answers,
    draw_anchors,
    make_blocks,
    slot_positions,
    teacher_forced,
)
from dspark_batch.train.fit import Loss
from dspark_batch.train.loss import LossMix, Terms, draft_loss
from dspark_batch.train.teacher import Ends, TappedTarget


def drafting_loss(
    drafter: DSparkDrafter,
    target: TappedTarget,
    mix: LossMix,
    num_anchors: Callable[[int], int],
) -> Loss:
    """Make the loss of a batch: tokens [N, T], which of them are answers, a key, the progress.

    Args:
        drafter: in training; reads the features that `target` gives.
        target: frozen.
        mix: of the loss.
        num_anchors: how many blocks a row of T positions has.
    """

    def loss(
        tokens: mx.array, answers: mx.array, key: mx.array, progress: mx.array | float = 1.0
    ) -> Terms:
        anchors, kept = draw_anchors(answers, num_anchors(tokens.shape[1]), key)
        blocks = make_blocks(Answers(tokens, answers), anchors, kept, drafter.block_size)
        teacher = target.teach(tokens, slot_positions(blocks, tokens.shape[1]))
        drafts = teacher_forced(drafter, teacher.features, tokens, blocks)
        logits = teacher.logits.reshape(*blocks.labels.shape, -1)
        return draft_loss(drafts, logits, blocks, mix, progress)

    return loss


def freeze_ends(drafter: DSparkDrafter, ends: Ends | None = None) -> None:
    """Keep a drafter's own embedding and head as they are, or as `ends` are; others it borrows."""
    if drafter.config.own_embedding:
        if ends is not None:
            drafter.embed_tokens.weight = ends.embedding
        drafter.embed_tokens.freeze()
    if drafter.config.own_head:
        if ends is not None:
            drafter.lm_head.weight = ends.head
        drafter.lm_head.freeze()
