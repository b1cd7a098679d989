"""Looked-up drafts: no byte changes, whoever drafts, and however wrong the drafts are."""

from functools import cache
from itertools import permutations

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.answers.sequence import Sequence
from dspark_batch.answers.who_drafts import LookUps, with_look_ups
from dspark_batch.drafters.drafter import Draft
from dspark_batch.drafters.lookup import Found, OnlyLookUps, TextIndex
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.pair import load_pair
from dspark_batch.spec.structure import structure_of
from dspark_batch.tuning.pace import Costs, Kind, Pace, Step
from dspark_batch.types import Item, Request, Sampling

COSTS = (1.0, 1 / 24, 0.3, 0.1)
NAME = "qwen3_vanilla"
FREE = Costs((1.0, 0.0, 0.0, 0.0))
ANY = 99.0  # more than a drafter can promise


@cache
def pair_of(name, drafts):
    pair = load_case(name).pair
    return pair if drafts else with_look_ups(pair._replace(drafter=NoDrafter()))


def requests(name, temperature=0.0, **choices):
    """Five items of different lengths; the one in the middle is greedy."""
    case, found = load_case(name), []
    for index in range(5):
        prompt_ids = case.prompt(f"greedy{index % 3}")[: 6 + index]
        sampling = Sampling(temperature=temperature * (index != 2), **choices)
        item = Item(index, str(index), f"digest-{index}", f"test:{index}")
        found.append(Request(item, prompt_ids, 16 - 2 * index, sampling))
    return found


def decode(name=NAME, drafts=True, temperature=0.0, choices=(), **settings):
    """Answer all; the answers by index."""
    outcomes = Engine(pair_of(name, drafts), **settings).generate(
        requests(name, temperature, **dict(choices))
    )
    return {outcome.item.index: outcome for outcome in outcomes}


@cache
def plainly(name=NAME, temperature=0.0, choices=()):
    return decode(name, temperature=temperature, choices=choices, slots=3, draft_length=0)


def told(answers):
    return {n: (a.token_ids, a.finish_reason, a.logprobs) for n, a in answers.items()}


def looked_up(answers):
    """Sum up drafts that were looked up: verified, accepted."""
    return tuple(map(sum, zip(*(answer.looked_up for answer in answers.values()), strict=True)))


class Planted:
    """Lets texts find what their answers will be, with mistakes, and sometimes nothing."""

    def __init__(self, monkeypatch, asked):
        self._prompts = {request.prompt_ids: request.item.index for request in asked}
        self.silent = set()  # prompts whose texts find nothing
        monkeypatch.setattr(TextIndex, "find", lambda text, count: self.find(text, count))

    def find(self, text, count):
        tokens = tuple(text._tokens)
        begin = max(len(p) for p in self._prompts if tokens[: len(p)] == p)
        if tokens[:begin] in self.silent:
            return None
        true = self.answers[self._prompts[tokens[:begin]]].token_ids[len(tokens) - begin :]
        found = [*true, *[0] * count][:count]
        for place in range(count):
            if self.is_wrong(len(tokens) + place):
                found[place] = max(0, found[place] - 1)
        text._found = Found(found, 5) if self.is_there(len(tokens)) else None
        return text._found

    def let(self, answers, is_wrong, is_there=lambda place: True):
        self.answers, self.is_wrong, self.is_there = answers, is_wrong, is_there


@pytest.fixture
def sometimes(monkeypatch):
    """Every slot takes what it finds: right tokens, then a wrong one; at some places nothing."""

    def plant(answers, asked=()):
        monkeypatch.setattr(LookUps, "_promised", lambda self, count: [ANY] * 9)
        planted = Planted(monkeypatch, asked or requests(NAME))
        planted.let(answers, lambda n: n % 5 == 3, lambda n: n % 4 != 1)

    return plant


class Strays(NoDrafter):
    """Drafts what a rule makes of logits that mean nothing."""

    block_size, num_layers = 4, 1

    def propose(self, anchor, context, num_drafts, choose):
        shape = (anchor.shape[0], 1536)
        noise = [mx.random.normal(shape, key=mx.random.key(k)) for k in range(num_drafts)]
        return Draft(mx.stack([choose(each, k, None) for k, each in enumerate(noise)], axis=1))


def is_mixed(answers):
    drafted, accepted = looked_up(answers)
    return 0 < accepted < drafted


@pytest.mark.parametrize(
    ("name", "drafts", "slots", "draft_length"),
    [
        *[(NAME, drafts, *shape) for drafts in (True, False) for shape in [(1, 7), (4, 3), (5, 6)]],
        *[("qwen35_dflash", True, 3, 5), ("qwen35_dflash", False, 3, 5)],
    ],
)
def test_greedy_answers_are_those_of_plain_decoding(sometimes, name, drafts, slots, draft_length):
    plain = plainly(name)
    sometimes(plain, requests(name))
    looked = decode(name, drafts, slots=slots, draft_length=draft_length, lookup=True)
    assert told(looked) == told(plain)
    assert is_mixed(looked)


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_sampled_answers_are_those_of_plain_decoding(sometimes, drafts, ahead):
    plain = plainly(temperature=1.0)
    sometimes(plain)
    looked = decode(drafts=drafts, temperature=1.0, slots=3, drafts_ahead=ahead, lookup=True)
    assert told(looked) == told(plain)
    assert is_mixed(looked)


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("wish", [("presence_penalty", 0.7), ("logit_bias", ((5, 3.0),))])
def test_steered_answers_and_their_scores_are_those_of_plain_decoding(sometimes, drafts, wish):
    choices = (wish, ("logprobs", 1))
    plain = plainly(choices=choices)
    sometimes(plain)
    looked = decode(drafts=drafts, choices=choices, slots=3, lookup=True)
    ids = {n: (a.token_ids, a.logprobs.top_ids) for n, a in looked.items()}
    assert ids == {n: (a.token_ids, a.logprobs.top_ids) for n, a in plain.items()}
    assert is_mixed(looked)


@pytest.mark.parametrize("drafter", [OnlyLookUps(), Strays()])
def test_structured_answers_are_those_of_plain_decoding(monkeypatch, drafter):
    pair = load_pair("tiny", dtype="float32")
    words = ["-".join(some) for some in permutations(("blue", "orange", "9", "violet"))]
    asked = []
    for index in range(4):
        said = [
            {"role": "user", "content": f"Repeat this text exactly: {words[5 * index]} and so on"}
        ]
        item = Item(index, str(index), f"digest-{index}", f"test:{index}")
        structure = structure_of("choice", words) if index else None
        sampling = Sampling(structure=structure)
        asked.append(Request(item, tuple(pair.tokenizer.render(said)), 24, sampling))

    def answers(pair, **settings):
        return {answer.item.index: answer for answer in Engine(pair, **settings).generate(asked)}

    plain, planted = answers(pair, draft_length=0), Planted(monkeypatch, asked)
    monkeypatch.setattr(LookUps, "_promised", lambda self, count: [ANY] * 9)
    planted.let(plain, is_wrong=lambda n: n % 7 == 3)
    planted.silent = {asked[0].prompt_ids}  # so the drafter drafts in all rounds
    looked = answers(pair._replace(drafter=drafter), slots=4, lookup=True)
    assert told(looked) == told(plain)
    assert is_mixed(looked)


@pytest.mark.parametrize("drafts", [True, False])
def test_neither_the_pace_nor_a_threshold_changes_an_answer(sometimes, drafts):
    sometimes(plainly())
    paced = {"lengths": tuple(range(8)), "costs": COSTS, "confidence_threshold": 0.5 * drafts}
    assert told(decode(drafts=drafts, slots=3, lookup=True, **paced)) == told(plainly())


@pytest.mark.parametrize("drafts", [True, False])
def test_wrong_ones_change_no_byte_and_are_given_up_where_there_is_a_drafter(monkeypatch, drafts):
    plain, planted = plainly(), Planted(monkeypatch, requests(NAME))
    planted.let(plain, is_wrong=lambda n: False)
    right = decode(drafts=drafts, slots=3, lookup=True)
    planted.let(plain, is_wrong=lambda n: True)
    wrong = decode(drafts=drafts, slots=3, lookup=True)
    assert told(right) == told(wrong) == told(plain)
    assert looked_up(wrong)[1] == 0
    assert looked_up(right)[1] > 0
    if drafts:
        assert looked_up(wrong)[0] < looked_up(right)[0]
    else:
        assert sum(looked_up(right)) < looked_up(wrong)[0]


def test_off_nothing_is_looked_up_and_nothing_remembered():
    engine = Engine(pair_of(NAME, True))
    engine.add(requests(NAME)[0])
    for _ in range(3):
        engine.step()
    assert [sequence.text for sequence in engine._slots.active] == [None]


def test_by_the_rejection_rule_nobody_looks_up(sometimes):
    settings = {"slots": 3, "temperature": 1.0, "sampling": "rejection", "draft_length": 3}
    expected = decode(**settings)
    sometimes(expected)
    looked = decode(lookup=True, **settings)
    assert looked_up(looked) == (0, 0)
    assert told(looked) == told(expected)


def test_a_round_in_which_nothing_is_found_has_no_drafts():
    request = Request(Item(0, "0", "d", "test:0"), (1, 2, 3, 4), 4)
    (answer,) = Engine(pair_of(NAME, False), lookup=True).generate([request])
    assert answer.num_drafted == (0, 0, 0)


def test_the_drafter_rests_in_a_round_in_which_all_slots_look_up(sometimes, monkeypatch):
    sometimes(plainly())
    engine = Engine(pair_of(NAME, True), slots=5, lookup=True)
    calls, propose = [], engine._passes.propose

    def counted(*asked):
        calls.append(1)
        return propose(*asked)

    monkeypatch.setattr(engine._passes, "propose", counted)
    list(engine.generate(requests(NAME)))
    with_some = len(calls)
    monkeypatch.setattr(TextIndex, "find", lambda text, count: Found([0] * count, 5))
    list(engine.generate(requests(NAME)))
    assert len(calls) == with_some > 0


def test_a_slot_that_finds_nothing_has_missed_the_drafts_of_the_others(monkeypatch):
    first, second = (n.prompt_ids for n in requests(NAME)[:2])
    planted = Planted(monkeypatch, requests(NAME)[:2])
    planted.let(plainly(), is_wrong=lambda place: False)
    planted.silent = {second}
    engine = Engine(pair_of(NAME, False), slots=2, lookup=True, lengths=(0, 4), costs=COSTS)
    learnt, add = [], engine._acceptance.add

    def noted(accepted, verified):
        learnt.append((accepted, verified))
        add(accepted, verified)

    monkeypatch.setattr(engine._acceptance, "add", noted)
    for request in requests(NAME)[:2]:
        engine.add(request)
    while not learnt:
        engine.step()
    assert first != second
    assert sorted(learnt) == [(0, 4), (4, 4)]


def seated(prompt_ids):
    sequence = Sequence(Request(Item(0, "0", "d", "test:0"), prompt_ids, 99), frozenset())
    sequence.begin(1)
    return sequence


def test_what_a_match_is_worth_is_learnt_without_a_try():
    pair = load_case("qwen3_vanilla").pair
    look_ups = LookUps(pair.drafter, 2, FREE, is_on=True)
    copies = seated((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12) * 2)
    for _ in range(30):  # the drafter is never right, but hope is the prior
        look_ups.find([copies, None], Step(7))
        used = look_ups.found
        copies.advance([], copies.token_ids[-1] % 12 + 1, 0)
    assert used == [[(copies.token_ids[-2] + n) % 12 + 1 for n in range(7)], []]
    strays = seated((1, 2, 3, 4, 1, 2, 3))
    look_ups.find([strays, None], Step(7))
    assert look_ups.found == [[], []]  # nothing is known of matches of three


def test_a_slot_that_the_drafter_does_not_serve_takes_what_is_found():
    look_ups = LookUps(load_case("qwen3_vanilla").pair.drafter, 1, FREE, is_on=True)
    sequence = seated((1, 2, 3, 4, 5, 2, 3, 4, 5))
    sequence.token_ids[:] = [2, 3]
    sequence.fallback = "the drafter failed"
    look_ups.find([sequence], Step(2))
    assert look_ups.found == [[4, 5]]


def test_what_a_text_knows_is_drafted_while_the_drafter_rests():
    look_ups = LookUps(load_case(NAME).pair.drafter, 2, FREE, jumps=range(9), is_on=True)
    copies, other = seated((1, 2, 3, 4, 5, 6, 7)), seated((1, 2, 3))
    copies.token_ids[:] = [2, 3, 4]
    look_ups.find([copies, other, None], Step(0, keeps_context=False))
    assert look_ups.found == [[5, 6, 7, 2, 3, 4, 5, 6], [], []]
    assert look_ups.looked_up == {0}
    assert look_ups.kind == Kind(3, 8, is_jump=True)


def test_where_tokens_are_dear_a_rest_stays_plain():
    dear = Costs((0.0, 1.0, 0.0, 0.0))
    look_ups = LookUps(load_case(NAME).pair.drafter, 2, dear, jumps=range(9), is_on=True)
    copies = seated((1, 2, 3, 4, 5, 6, 7))
    copies.token_ids[:] = [2, 3, 4]
    look_ups.find([copies, None], Step(0, keeps_context=False))
    assert look_ups.found == [[], []]
    assert look_ups.kind == Kind(2, 0, rests=True)


def test_look_ups_of_a_rest_must_gain_over_what_its_rounds_take():
    costs = Costs((1.0, 0.0, 0.0, 0.0))
    for _ in range(8):
        costs.add(Kind(1, 0), 4.0)
        costs.add(Kind(1, 0, rests=True), 1.0)
        costs.add(Kind(1, 8, is_jump=True), 3.0)
    look_ups = LookUps(load_case(NAME).pair.drafter, 1, costs, jumps=(0, 8), is_on=True)
    copies = seated((1, 2, 3, 4, 5, 6, 7))
    copies.token_ids[:] = [2, 3, 4]
    look_ups.find([copies], Step(0, keeps_context=False))
    assert look_ups.found == [[]]


def test_without_a_drafter_nothing_is_looked_up_in_a_rest():
    look_ups = LookUps(OnlyLookUps(), 1, FREE, jumps=range(9), is_on=True)
    copies = seated((1, 2, 3, 4, 5, 6, 7))
    copies.token_ids[:] = [2, 3, 4]
    look_ups.find([copies], Step(0, keeps_context=False))
    assert look_ups.found == [[]]


def test_look_ups_of_a_rest_change_no_byte(monkeypatch):
    rest = Step(0, keeps_context=False)
    monkeypatch.setattr(Pace, "_first", lambda self, slots: 0)
    monkeypatch.setattr(Pace, "next", lambda self, slots, served: rest)
    planted = Planted(monkeypatch, requests(NAME))
    planted.let(plainly(), is_wrong=lambda n: n % 5 == 3)
    shapes = {"lengths": (0, 2, 4), "costs": COSTS}
    looked = decode(slots=3, lookup=True, **shapes)
    assert told(looked) == told(plainly())
    assert looked_up(looked)[1] > 10


def test_only_look_ups_draft_nothing_of_their_own():
    drafter = OnlyLookUps()
    draft = drafter.propose(mx.array([1, 2]), drafter.make_cache(2, 8), 5, None)
    assert isinstance(draft, Draft)
    assert draft.tokens.shape == (2, 0)
    assert with_look_ups(load_case("qwen3_vanilla").pair).drafter.block_size == 7
