"""What a drafter gets wrong costs speed, never an answer: its item is decoded plainly."""

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# What a model raises while it builds its graph. Running out of memory comes later, at `mx.eval`.
FAULTS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)

NOT_FINITE = "the drafter's logits are not numbers"


class DrafterFault(Exception):
    """The drafter cannot go on with these slots; says why."""


def guarded(call: Callable[[], Result]) -> Result:
    """Call a drafter.

    Raises:
        DrafterFault: it failed, and what its context holds now means nothing.
    """
    try:
        return call()
    except FAULTS as error:
        raise DrafterFault(f"the drafter failed ({type(error).__name__}: {error})") from error
