"""Hybrid targets against the reference: states too, since right tokens prove nothing."""

from functools import cache

import pytest
from golden_cases import HYBRIDS, largest_difference, load_case
from lockstep import Replay

TOLERANCE = 1e-4
LOCKSTEPS = [
    (case, run)
    for case in HYBRIDS
    for run in ("greedy0", "greedy1")
    if f"{run}.rounds.verify_logits" in load_case(case)
]


class Compared(Replay):
    """A replay that notes the largest difference of each tensor."""

    def __init__(self, name, run):
        super().__init__(name, run)
        self.found = {}

    def compare(self, ours, recorded, name):
        difference = largest_difference(ours, recorded)
        self.found[name] = max(difference, self.found.get(name, 0))

    def compare_states(self, when):
        for number, layer in enumerate(self.cache.layers):
            for at, kind in enumerate(("conv_state", "recurrent_state")):
                name = f"{when}.{kind}.{number}"
                if name in self.case:
                    self.compare(layer.held()[at][0], self.case[name], name)

    def compare_round(self, index):
        recorded = self.recorded("verify_logits")[index]
        self.compare(self.verify_logits, recorded, "verify_logits")
        if self.run == "greedy0":
            self.compare_states(f"round{index}")


@cache
def differences(case, run):
    """The largest differences of a run, by the tensor's name."""
    replay = Compared(case, run)
    if run == "greedy0":
        fused = replay.pair.drafter.fuse(replay.features[0])
        for name, ours in (
            ("prefill.logits", replay.prompt_logits),
            ("prefill.tap_features", replay.features[0]),
            ("prefill.fused_context", fused),
        ):
            replay.compare(ours, replay.case[name], name)
        replay.compare_states("prefill")
    for index, anchor in replay.rounds():
        if index > 0:
            replay.compare_round(index - 1)
        draft = replay.propose(anchor)
        replay.compare(draft.tokens[0], replay.recorded("draft_tokens")[index], "draft_tokens")
        logits = replay.recorded("corrected_logits")[index]
        replay.compare(draft.logits[0], logits, "corrected_logits")
    replay.compare_round(index)
    return replay.found


@pytest.mark.parametrize(("case", "run"), LOCKSTEPS)
def test_every_recorded_tensor_is_near(case, run):
    found = dict(differences(case, run))
    assert found.pop("draft_tokens") == 0
    assert max(found.values()) < TOLERANCE, found
    if run == "greedy0":
        recorded = {name for name in load_case(case).tensors if "_state." in name}
        assert recorded
        assert recorded <= set(found)
