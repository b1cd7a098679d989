"""How many drafts stay."""

import mlx.core as mx


def accept_greedy(draft: mx.array, choice: mx.array, verify_len: mx.array) -> mx.array:
    """Count the leading draft tokens that the target would have chosen itself.

    Args:
        draft: [B, K] int32, token ids from the drafter.
        choice: [B, K+1] int32, the target's argmax after the anchor and after each draft.
        verify_len: [B] int32 in 0..K, how many drafts of each slot were verified.

    Returns:
        [B] int32 in 0..K, accepted drafts; the bonus token is not counted.

    Source:
        Leviathan et al. 2023 (arXiv:2211.17192), Algorithm 1 at temperature 0.
    """
    position = mx.arange(draft.shape[1])
    agrees = (draft == choice[:, :-1]) & (position < verify_len[:, None])
    return mx.cumprod(agrees.astype(mx.int32), axis=1).sum(axis=1)
