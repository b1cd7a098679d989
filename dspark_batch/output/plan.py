"""How a job is decoded on its machine: what reports and people are told of the set-up."""

from dspark_batch.record.formats import TellingPlan
from dspark_batch.types import SetupJson


def plan_text(plan: TellingPlan) -> str:
    """Say a plan in one line."""
    most = f"slots {plan['slots']}, draft length {plan['draft_length']} at most"
    return f"{plan['dtype']}, {most}; {plan['why']}"


def plan_of(setup: SetupJson) -> TellingPlan:
    """Take the plan out of a set-up, as the manifest has it."""
    shape = setup["step_shape"]
    return {
        **setup["plan"],
        "dtype": setup["dtype"],
        "step_shape": "any" if shape is None else f"{shape[0]} slots by {shape[1]} tokens, always",
    }
