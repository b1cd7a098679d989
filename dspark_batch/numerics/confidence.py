"""How far a block is worth verifying, from the drafter's own estimate."""

import mlx.core as mx


def threshold_lengths(confidence: mx.array, threshold: float) -> mx.array:
    """Cut each block before its first draft whose confidence is below a threshold.

    Args:
        confidence: [B, K] float32 logits, each conditional on all earlier drafts being accepted.
        threshold: a probability; 0 or less never cuts.

    Returns:
        [B] int32 in 0..K, drafts to verify.

    Source:
        DeepSpec's evaluator: strict comparison, on the conditional confidence.
    """
    sure = mx.sigmoid(confidence) >= threshold
    return mx.cumprod(sure.astype(mx.int32), axis=1).sum(axis=1)
