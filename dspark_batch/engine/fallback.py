"""What a drafter gets wrong costs speed, never an answer: its item is decoded plainly."""

import mlx.core as mx

from dspark_batch.models.dspark import Choose, Context, Draft, DSparkDrafter
from dspark_batch.models.plain import NoDrafter

# What a model raises while it builds its graph. Running out of memory comes later, at `mx.eval`.
FAULTS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)

NOT_FINITE = "the drafter's logits are not numbers"


class DrafterFault(Exception):
    """The drafter cannot go on with these slots; says why."""


def extend(drafter: DSparkDrafter | NoDrafter, context: Context, features: mx.array | None) -> None:
    """Extend a drafter's context.

    Raises:
        DrafterFault: it failed, and what the context holds now means nothing.
    """
    try:
        drafter.extend(context, features)
    except FAULTS as error:
        raise DrafterFault(_said(error)) from error


def propose(
    drafter: DSparkDrafter | NoDrafter,
    anchor: mx.array,
    context: Context,
    num_drafts: int,
    choose: Choose,
) -> Draft:
    """Let a drafter propose.

    Raises:
        DrafterFault: it failed.
    """
    try:
        return drafter.propose(anchor, context, num_drafts, choose)
    except FAULTS as error:
        raise DrafterFault(_said(error)) from error


def is_sane(draft: Draft) -> mx.array:
    """Tell which slots' drafts were chosen from numbers; [S] bool.

    A token that the drafter does not know has a logit of -inf; inf and NaN are faults.
    """
    if draft.logits is None:
        return mx.ones(draft.tokens.shape[0], dtype=mx.bool_)
    return (draft.logits < mx.inf).all(axis=(1, 2))


def _said(error: Exception) -> str:
    return f"the drafter failed ({type(error).__name__}: {error})"
