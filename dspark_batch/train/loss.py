"""What a drafter is trained for: the right token, the target's distribution, a true confidence.

Source:
    DSpark, section on training: 0.1 cross entropy, 0.9 L1 distance, 1.0 confidence, decay 4.
    That a training begins with cross entropy alone is ours: where a draft is hopeless, the L1
    distance has no gradient.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.train.blocks import Blocks, Drafts
from dspark_batch.train.compare import compare

TINY = 1e-6  # keeps the loss finite when no slot counts


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMix:
    """How much of each term the loss has at the end; w_k = exp(-k / decay) for slot k.

    At the beginning it has the cross entropy once and no L1 distance, and in between it goes from
    there to here in a straight line.
    """

    cross_entropy: float
    total_variation: float  # of the L1 distance to the target's distribution
    confidence: float
    decay: float = 4.0


DSPARK = LossMix(cross_entropy=0.1, total_variation=0.9, confidence=1.0)
DFLASH = LossMix(cross_entropy=1.0, total_variation=0.0, confidence=0.0)


class Terms(NamedTuple):
    """A loss and its parts, scalars; each averaged over the slots that count."""

    loss: mx.array
    cross_entropy: mx.array
    distance: mx.array  # L1, 0 to 2
    doubt: mx.array  # binary cross entropy of the confidence
    accept_length: mx.array  # that sampled drafts could expect, bonus included


def draft_loss(
    drafts: Drafts,
    target_logits: mx.array,
    blocks: Blocks,
    mix: LossMix,
    progress: mx.array | float = 1.0,
) -> Terms:
    """Mix the three terms.

    Args:
        drafts: of all slots.
        target_logits: [N, A, K, V], the target's at anchor + k.
        blocks: labels, and which slots count.
        mix: how much of each.
        progress: of the training, 0 to 1.
    """
    slot = mx.exp(-mx.arange(blocks.labels.shape[-1]) / mix.decay)
    weight = slot * blocks.counts
    total = weight.sum() + TINY
    surprise, distance = compare(drafts.logits, target_logits, blocks.labels)
    entropy = (surprise * weight).sum() / total
    variation = (distance * weight).sum() / total
    accept = mx.stop_gradient(mx.clip(1 - distance / 2, 0, 1))
    doubt = mx.zeros(())
    if drafts.confidence is not None:
        each = nn.losses.binary_cross_entropy(drafts.confidence, accept, reduction="none")
        doubt = (each * weight).sum() / total
    surprising = 1 + progress * (mix.cross_entropy - 1)
    far = progress * mix.total_variation
    loss = surprising * entropy + far * variation + mix.confidence * doubt
    return Terms(loss, entropy, variation, doubt, _expected_length(accept, blocks.counts))


def _expected_length(accept: mx.array, counts: mx.array) -> mx.array:
    """Average 1 + sum_k prod_{j<=k} accept_j over the anchors that count."""
    survival = mx.cumprod(accept * counts, axis=-1).sum(axis=-1)
    anchors = counts[..., 0]
    return 1 + (survival * anchors).sum() / (anchors.sum() + TINY)
