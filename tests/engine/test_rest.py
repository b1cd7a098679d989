"""While the drafter rests, prompts are not read into its context, and no token changes."""

from functools import cache

import pytest

from dspark_batch.engine.engine import Engine
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.scheduler import Scheduler
from dspark_batch.pair import load_pair
from dspark_batch.tuning.pace import Kind, Pace, Step
from dspark_batch.types import Item, Request

AT_REST = Step(0, keeps_context=False)
ITEMS, SLOTS, REST = 20, 2, 80  # rounds of rest


@cache
def pair():
    return load_pair("tiny", dtype="float32")


def requests():
    for index in range(ITEMS):
        asked = [{"role": "user", "content": f'Spell "cat{index}" backwards.'}]
        ids = tuple(pair().tokenizer.render(asked))
        yield Request(Item(index, str(index), f"digest-{index}", f"test:{index}"), ids, 12)


@pytest.fixture
def rests(monkeypatch):
    """Let the drafter rest for some rounds, and draft behind them; note what each wave has."""
    rounds, waves, end = iter(range(10**6)), [], Scheduler._end_wave

    extended, extend = [], Passes.extend

    def noted(self, context, features):
        extended.append(context)
        extend(self, context, features)

    def ended(self, filled):
        end(self, filled)
        told = {sequence.has_context for _, sequence in self._through[-1].sequences}
        written = any(context is filled.context for context in extended)
        waves.append((told, written))

    def step(self, slots, served):
        return AT_REST if next(rounds) < REST else Step(3)

    monkeypatch.setattr(Pace, "next", step)
    monkeypatch.setattr(Passes, "extend", noted)
    monkeypatch.setattr(Scheduler, "_end_wave", ended)
    return waves


def test_only_those_have_a_context_whom_the_drafter_may_be_asked_about(rests):
    settings = {"slots": SLOTS, "lengths": (0, 3), "costs": (1.0, 0.0, 0.3, 0.0)}
    said = {a.item.index: a for a in Engine(pair(), **settings).generate(requests())}
    plain = {a.item.index: a for a in Engine(pair(), draft_length=0).generate(requests())}
    assert {n: a.token_ids for n, a in said.items()} == {n: a.token_ids for n, a in plain.items()}
    assert all(told == {written} for told, written in rests)
    first, *later = (written for _, written in rests)
    assert first  # it began before any round said so
    assert not all(later)
    assert later[-1]
    drafted = [sum(answer.num_drafted) for _, answer in sorted(said.items())]
    assert 0 in drafted
    assert sum(drafted) > 0


def test_an_engine_knows_by_rule_what_a_context_costs():
    for draft_length, share in ((None, (3 + 1) / (3 + 1 + 12 * 6)), (0, 0.0)):  # 3 taps
        costs = Engine(pair(), slots=2, draft_length=draft_length).costs
        kept, rests = (costs.round_s(Kind(2, 0, rests=rests)) for rests in (False, True))
        assert rests == pytest.approx((1 - share) * kept)
