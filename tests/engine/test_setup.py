"""From what passes cost to how a job decodes."""

import pytest
from golden_cases import load_case

from dspark_batch.engine import setup as planning
from dspark_batch.engine.machine import Machine
from dspark_batch.engine.scheduler import DrafterPass, TargetPass
from dspark_batch.engine.setup import set_up
from dspark_batch.engine.shapes import Shapes
from dspark_batch.models.plain import NoDrafter

PASSES = tuple(TargetPass(slots, width, 1.0) for slots in (1, 4) for width in (1, 8))


@pytest.fixture
def set_up_with(monkeypatch):
    """Set up on a machine that is only numbers; drafting takes so many seconds."""

    def made(draft_s, pair=None, **asked):
        machine = Machine(Shapes(), "digest", PASSES, (), 0.0)
        drafter = [DrafterPass(4, draft_s)]
        monkeypatch.setattr(planning, "_machine", lambda *_: machine)
        monkeypatch.setattr(planning, "_drafter_passes", lambda *_: drafter)
        return set_up(pair or load_case("qwen3_vanilla").pair, **asked)

    return made


@pytest.mark.parametrize(
    ("draft_s", "asked", "draft_length"),
    [
        (9.0, {"num_items": 5}, 0),
        (9.0, {}, None),
        (9.0, {"num_items": 4}, None),  # they end one after the other, and few may draft
        (9.0, {"draft_length": 7, "num_items": 5}, 7),
        (6.5, {"num_items": 5}, None),  # eight tokens in 7.5 seconds, if all drafts are right
    ],
)
def test_a_drafter_that_could_not_pay_is_not_kept_ready(set_up_with, draft_s, asked, draft_length):
    found = set_up_with(draft_s, **asked)
    assert found.plan.slots == 4
    assert found.draft_length == draft_length
    assert ("even if all were right" in found.plan.why) == (draft_length == 0)


def test_without_a_drafter_nobody_says_that_it_would_not_pay(set_up_with):
    plain = load_case("qwen3_vanilla").pair._replace(drafter=NoDrafter())
    found = set_up_with(9.0, pair=plain, num_items=5)
    assert "even if" not in found.plan.why
    assert found.plan.draft_length == 0


@pytest.mark.parametrize(("num_items", "slots"), [(None, 4), (9, 4), (3, 3), (1, 1), (0, 4)])
def test_no_more_slots_are_planned_than_there_are_items(set_up_with, num_items, slots):
    assert set_up_with(1.0, num_items=num_items).plan.slots == slots
    assert set_up_with(1.0, num_items=num_items, slots=4).plan.slots == 4
