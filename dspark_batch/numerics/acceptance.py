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
    return count_leading(draft == choice[:, :-1], verify_len)


def accept_with_bonus(
    draft: mx.array, choice: mx.array, verify_len: mx.array
) -> tuple[mx.array, mx.array]:
    """Accept as `accept_greedy` does; return also the bonus tokens [B]."""
    accepted = accept_greedy(draft, choice, verify_len)
    return accepted, mx.take_along_axis(choice, accepted[:, None], axis=1)[:, 0]


def count_leading(accepts: mx.array, verify_len: mx.array) -> mx.array:
    """Count the accepted drafts before the first that is not, or was not verified.

    Args:
        accepts: [B, K] bool.
        verify_len: [B] int32 in 0..K.

    Returns:
        [B] int32 in 0..K.
    """
    accepts = accepts & (mx.arange(accepts.shape[1]) < verify_len[:, None])
    return mx.cumprod(accepts.astype(mx.int32), axis=1).sum(axis=1)
