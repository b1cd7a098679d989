"""What a grammar forces is drafted where no drafter drafts, and changes no token."""

from functools import cache

import pytest

from dspark_batch.answers.who_drafts import with_look_ups
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.models.grammar import Guide
from dspark_batch.pair import load_pair
from dspark_batch.spec.structure import structure_of
from dspark_batch.tuning.pace import Costs, Kind, Pace, Step
from dspark_batch.types import Item, Request, Sampling

NAMES = ("a_name_that_must_come", "another_one", "third")
FORCED = structure_of(
    "json_schema",
    {"type": "object", "properties": {n: {"type": "boolean"} for n in NAMES}, "required": [*NAMES]},
)
STRUCTURES = [FORCED, None, structure_of("choice", ["yes", "perhaps"]), FORCED]
AT_REST = Step(0, keeps_context=False)


@cache
def pair_of(drafts):
    pair = load_pair("tiny", dtype="float32")
    return pair if drafts else pair._replace(drafter=NoDrafter())


def requests(temperature=0.0, **choices):
    found = []
    for index, structure in enumerate(STRUCTURES):
        asked = [{"role": "user", "content": f'Spell "cat{index}" backwards.'}]
        item = Item(index, str(index), f"digest-{index}", f"test:{index}")
        sampling = Sampling(temperature=temperature, structure=structure, **choices)
        ids = tuple(pair_of(True).tokenizer.render(asked))
        found.append(Request(item, ids, 36, sampling))
    return found


def answers(drafts, temperature=0.0, choices=(), **settings):
    engine = Engine(pair_of(drafts), slots=3, **settings)
    outcomes = engine.generate(requests(temperature, **dict(choices)))
    return {outcome.item.index: outcome for outcome in outcomes}


def told(answers):
    return {n: (a.token_ids, a.finish_reason, a.logprobs) for n, a in answers.items()}


@cache
def plain(temperature=0.0, choices=()):
    return answers(False, temperature, choices, draft_length=0)


def num_accepted(answers):
    return {n: sum(answer.num_accepted) for n, answer in answers.items()}


@pytest.fixture(autouse=True)
def _no_round_says_what_it_took(monkeypatch):
    """Jumps are then chosen by the rule, however busy the machine is."""
    monkeypatch.setattr(Costs, "add", lambda self, kind, seconds: None)


@pytest.fixture
def rests(monkeypatch):
    """Let the drafter rest from the first round on."""
    monkeypatch.setattr(Pace, "next", lambda self, slots, served: AT_REST)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_without_a_drafter_jumps_ahead(temperature):
    said = answers(False, temperature)
    assert told(said) == told(plain(temperature))
    assert said[0].num_accepted[:-1] == said[0].num_drafted[:-1]  # the limit cuts the last
    assert len(said[0].accept_lengths) < 2 / 3 * len(said[0].token_ids)
    assert num_accepted(said)[1] == 0
    assert {answer.looked_up for answer in said.values()} == {(0, 0)}


def test_so_does_one_whose_drafter_rests(rests):
    paced = {"lengths": (0, 7), "costs": (1.0, 0.0, 0.3, 0.0)}
    said = answers(True, **paced)
    assert told(said) == told(plain())
    assert num_accepted(said)[3] == num_accepted(answers(False))[3] > 0


def test_so_does_one_whose_drafter_failed(monkeypatch):
    engine = Engine(pair_of(True), slots=3)

    def fails(*asked):
        raise ValueError("it failed")

    monkeypatch.setattr(engine._passes, "propose", fails)
    said = {outcome.item.index: outcome for outcome in engine.generate(requests())}
    assert {n: a.token_ids for n, a in said.items()} == {n: a.token_ids for n, a in plain().items()}
    assert "it failed" in said[3].fallback
    assert num_accepted(said)[3] > 0


@pytest.mark.parametrize("lengths", [(), (0, 8)])
def test_look_ups_and_jumps_draft_for_the_same_slots(lengths, monkeypatch):
    engine = Engine(with_look_ups(pair_of(False)), slots=3, lookup=True, lengths=lengths)
    said = {outcome.item.index: outcome for outcome in engine.generate(requests())}
    assert told(said) == told(plain())
    assert num_accepted(said)[0] >= num_accepted(answers(False))[0]
    assert all(a.looked_up[0] < sum(a.num_drafted) for n, a in said.items() if n in (0, 3))


def test_scores_are_those_of_plain_decoding():
    choices = (("logprobs", 1),)
    scored, expected = answers(False, choices=choices), plain(choices=choices)
    assert {n: (a.token_ids, a.logprobs.top_ids) for n, a in scored.items()} == {
        n: (a.token_ids, a.logprobs.top_ids) for n, a in expected.items()
    }


def test_what_is_forced_wrongly_is_not_accepted(monkeypatch):
    forced = Guide.forced
    monkeypatch.setattr(Guide, "forced", lambda self: [max(0, t - 1) for t in forced(self)])
    assert told(answers(False)) == told(plain())


@pytest.mark.parametrize(
    "settings", [{"draft_length": 0}, {"sampling": "rejection", "temperature": 1.0}], ids=str
)
def test_nobody_jumps_who_decodes_plainly_or_by_the_rejection_rule(settings):
    said = answers(False, **settings)
    assert all(drafted == 0 for answer in said.values() for drafted in answer.num_drafted)


def test_a_trial_round_without_drafts_has_none(monkeypatch):
    monkeypatch.setattr(Pace, "next", lambda self, slots, served: Step(0))
    said = answers(True, lengths=(0, 7), costs=(1.0, 0.0, 0.3, 0.0))
    assert said[3].num_drafted[1:] == (0,) * (len(said[3].num_drafted) - 1)


def test_the_pace_learns_what_jumps_cost_and_nothing_of_their_drafts(rests):
    engine = Engine(pair_of(True), slots=3, lengths=(0, 7), costs=(1.0, 0.0, 0.3, 0.0))
    kinds = []
    engine.costs.add = lambda kind, seconds: kinds.append(kind)
    list(engine.generate(requests()))
    jumps = {kind for kind in kinds if kind.is_jump}
    assert jumps
    assert all(kind.draft_length > 0 for kind in jumps)
    assert Kind(3, 0, rests=True) in kinds
    assert {kind for kind in kinds if kind.is_drafted} <= {Kind(3, 7)}  # the first round
    assert all(reached <= 3 for _, reached in engine._acceptance._seen)


def test_a_round_with_forced_drafts_took_no_drafter():
    costs = Costs((1.0, 0.5, 0.25, 0.125))
    assert costs.round_s(Kind(4, 3, is_jump=True)) == pytest.approx(1 + 16 * 0.5)


def test_a_jump_is_as_long_as_it_pays():
    dear, cheap = Costs((1.0, 0.9, 9.0, 9.0)), Costs((1.0, 0.1, 9.0, 9.0))  # nothing drafts
    assert dear.worth([4], 1, range(9)) == 4
    assert dear.worth([0, 0, 0], 3, range(9)) == 0
    assert dear.worth([1, 1, 0], 3, range(9)) == 0  # 3 / 3.7 against 5 / 6.4
    assert cheap.worth([4, 1, 0], 3, range(9)) == 4  # 8 / 2.5 against 7 / 2.2
    assert (dear.worth([3, 3], 2, (0, 8)), cheap.worth([3, 3], 2, (0, 8))) == (0, 8)
