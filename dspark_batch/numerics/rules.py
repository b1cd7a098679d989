"""The rules by which tokens are drafted and accepted."""

import mlx.core as mx

from dspark_batch.numerics.acceptance import accept_greedy


class Greedy:
    """Temperature 0: the most likely token, the lowest id among equals."""

    def draft(self, logits: mx.array, k: int) -> mx.array:
        """Choose the drafts [B] of block position k from the drafter's logits [B, V]."""
        return mx.argmax(logits, axis=-1)

    def verify(
        self, drafts: mx.array, verify_len: mx.array, logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Decide how many drafts stay and which token follows them.

        Args:
            drafts: [B, K] int32.
            verify_len: [B] int32 in 0..K, how many of them count.
            logits: [B, K+1, V], the target's, after the anchor and after each draft.

        Returns:
            Accepted drafts [B] and the bonus tokens [B], int32.
        """
        choice = mx.argmax(logits, axis=-1).astype(mx.int32)
        accepted = accept_greedy(drafts, choice, verify_len)
        return accepted, mx.take_along_axis(choice, accepted[:, None], axis=1)[:, 0]
