"""A drafter that pays for its drafts and then gets others, which are right as often as told.

Simulated acceptance at real cost: weights that nobody trained draft nothing that is right, but
what they cost is what trained ones cost.
"""

import mlx.core as mx

from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.numerics.chance import Chance

# P(a draft is accepted | those before it were), by block position. The paper gives the accept
# length of Qwen3-4B's drafter at block 7 (MATH 5.70, MBPP 5.13, MT-Bench 3.64; Table 1) and, of its
# positions, only the first for math (0.93). Positions without a figure share the one number that
# makes 1 + sum of survivals the paper's accept length.
PROFILES = {
    "math": (0.93, *[0.889] * 6),
    "code": (0.868,) * 7,
    "chat": (0.754,) * 7,
}


def accept_length(profile):
    """Compute the mean accept length, bonus included, of conditional acceptances."""
    survival, total = 1.0, 1.0
    for conditional in profile:
        survival *= conditional
        total += survival
    return total


class Rehearsed(DSparkDrafter):
    """Drafts as the real one does, then says what follows, or something else."""

    def propose(self, anchor, context, num_drafts, choose):
        """Draft from the anchor; see `DSparkDrafter.propose`."""
        draft = super().propose(anchor, context, num_drafts, choose)
        right = self._following[anchor][:, :num_drafts]
        # Named by anchor and position, so no two rounds share a number.
        keys = mx.stack([anchor, mx.zeros_like(anchor)], axis=1).astype(mx.uint32)
        uniforms = Chance(keys, context.lengths).accept_uniforms(num_drafts)
        wrong = mx.where(draft.tokens == right, (right + 1) % len(self._following), draft.tokens)
        is_right = uniforms < self._profile[:num_drafts]
        return draft._replace(tokens=mx.where(is_right, right, wrong).astype(anchor.dtype))


def rehearse(drafter, follower, profile):
    """Let a drafter be right as often as a profile says.

    Args:
        drafter: changed in place; may be told another profile later.
        follower: [V] int32, the token that the target says after each token.
        profile: conditional acceptance by block position.
    """
    columns = [follower]
    while len(columns) < drafter.block_size:
        columns.append(follower[columns[-1]])
    drafter.__class__ = Rehearsed
    drafter._following = mx.stack(columns, axis=1)
    drafter._profile = mx.array(profile)
    mx.eval(drafter._following, drafter._profile)
