"""A round runs over the tokens that are used, where slots have different drafts; same bytes."""

from functools import cache

import pytest
from golden_cases import load_case
from grids import grid

from dspark_batch.answers.who_drafts import LookUps, with_look_ups
from dspark_batch.drafters.lookup import Found, TextIndex
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine import shapes as shapes_module
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.shapes import Shapes
from dspark_batch.pair import load_pair
from dspark_batch.spec.structure import structure_of
from dspark_batch.tuning.pace import Costs
from dspark_batch.types import Item, Request, Sampling

DENSE, GATED, HYBRID = "qwen3_vanilla", "qwen3_gated", "qwen35_dflash"
FORCED = {
    "type": "object",
    "properties": {"a_name_that_must_come": {"type": "boolean"}},
    "required": ["a_name_that_must_come"],
}
WHOLE = Shapes(packed=False)


@pytest.fixture(autouse=True)
def _worth_it_sooner(monkeypatch):
    """Few slots of a few tokens leave out few."""
    monkeypatch.setattr(shapes_module, "_LEAST_LEFT_OUT", 1)
    monkeypatch.setattr(shapes_module, "_LEAST_SHARE_LEFT_OUT", 0.1)


class Watched:
    """A target whose tokens are counted."""

    def __init__(self, target):
        self._target = target
        self.got = 0

    def __getattr__(self, name):
        return getattr(self._target, name)

    def __call__(self, tokens, cache, at=None):
        self.got += tokens.size
        return self._target(tokens, cache, at)


def requests(name, **choices):
    """Five items of different lengths."""
    case, found = load_case(name), []
    for index in range(5):
        sampling = Sampling(**choices)
        item = Item(index, str(index), f"digest-{index}", f"test:{index}")
        prompt_ids = case.prompt(f"greedy{index % 3}")[: 6 + index]
        found.append(Request(item, prompt_ids, 20 - 2 * index, sampling))
    return found


def run(pair, asked, **settings):
    """Answer all; the answers, and of each round all tokens, those used, and those computed."""
    watched = Watched(pair.target)
    engine = Engine(pair._replace(target=watched), slots=5, **settings)
    rounds, verify = [], engine._passes.verify

    def counted(cache, tokens, verify_len, *more):
        before = watched.got
        verified = verify(cache, tokens, verify_len, *more)
        used = (1 + verify_len).sum().item()
        rounds.append((tokens.size, used, watched.got - before))
        return verified

    engine._passes.verify = counted
    return {outcome.item.index: outcome for outcome in engine.generate(asked)}, rounds


def told(answers):
    """All that is told of the answers, but for who looked up what."""
    return {
        n: (a.token_ids, a.finish_reason, a.logprobs, a.num_drafted, a.num_accepted, a.confidence)
        for n, a in answers.items()
    }


def are_packed(rounds):
    return [all_tokens > got for all_tokens, _, got in rounds]


def assert_packs(rounds):
    """Each round computes what it uses, or all where leaving the others out is worth little."""
    for all_tokens, used, got in rounds:
        assert got == (used if used <= 0.9 * all_tokens else all_tokens)
    assert sum(are_packed(rounds)) > len(rounds) / 4


@pytest.fixture
def some_look_up(monkeypatch):
    """Let texts of three of five items find what their answers will be, with mistakes."""

    def plant(asked, answers):
        monkeypatch.setattr(LookUps, "_promised", lambda self, count: [99.0] * 9)
        prompts = [each.prompt_ids for each in asked]

        def find(text, count):
            tokens = tuple(text._tokens)
            prompt = max((p for p in prompts if tokens[: len(p)] == p), key=len)
            if prompts.index(prompt) % 2:
                return None
            known = answers[prompts.index(prompt)].token_ids
            place = len(tokens) - len(prompt)
            true = [*known[place:], *[0] * count][:count]
            true[place % 3] = 0
            text._found = Found(true, 5)
            return text._found

        monkeypatch.setattr(TextIndex, "find", find)

    return plant


@cache
def alone(name):
    return with_look_ups(load_case(name).pair._replace(drafter=NoDrafter()))


WISHES = {
    "greedy": {},
    "scored": {"logprobs": 2},
    "drawn": {"temperature": 1.0, "seed": 7},
    "steered": {"presence_penalty": 0.7, "frequency_penalty": 0.3},
}


@pytest.mark.parametrize("wish", WISHES)
def test_look_ups_run_over_what_is_drafted(some_look_up, wish):
    asked = requests(DENSE, **WISHES[wish])
    plain, _ = run(load_case(DENSE).pair, asked, draft_length=0)
    some_look_up(asked, plain)
    packed, rounds = run(alone(DENSE), asked, lookup=True)
    whole, rest = run(alone(DENSE), asked, lookup=True, shapes=WHOLE)
    assert told(packed) == told(whole)
    assert {n: a.token_ids for n, a in packed.items()} == {n: a.token_ids for n, a in plain.items()}
    assert_packs(rounds)
    assert not any(are_packed(rest))
    assert sum(got for *_, got in rounds) < 0.8 * sum(got for *_, got in rest)
    assert sum(map(sum, (a.num_accepted for a in packed.values()))) > 0


@pytest.mark.parametrize(
    ("wish", "sampling", "lookup"),
    grid([*WISHES], ["coupled", "rejection"], [False, True]),
)
def test_a_threshold_leaves_unsure_drafts_out(some_look_up, wish, sampling, lookup):
    """Features go to the drafter, so that it drafts the same."""
    pair, asked = load_case(GATED).pair, requests(GATED, **WISHES[wish])
    plain, _ = run(pair, asked, draft_length=0)
    some_look_up(asked, plain)
    settings = {"confidence_threshold": 0.5, "log_confidence": True, "sampling": sampling}
    packed, rounds = run(pair, asked, lookup=lookup, **settings)
    whole, rest = run(pair, asked, lookup=lookup, shapes=WHOLE, **settings)
    assert told(packed) == told(whole)
    assert_packs(rounds)
    assert not any(are_packed(rest))


def test_a_free_slot_has_one_token():
    pair, asked = load_case(DENSE).pair, requests(DENSE)
    packed, rounds = run(pair, asked)
    whole, _ = run(pair, asked, shapes=WHOLE)
    assert told(packed) == told(whole)
    assert any(are_packed(rounds))  # some end before others do


def test_what_grammars_force_is_run_over_alone(monkeypatch):
    monkeypatch.setattr(Costs, "add", lambda self, kind, seconds: None)
    pair = load_pair("tiny", dtype="float32")
    pair = pair._replace(drafter=NoDrafter())
    asked = []
    for index, has_form in enumerate((True, False, True, False)):
        chat = [{"role": "user", "content": f'Spell "cat{index}" backwards.'}]
        sampling = Sampling(structure=structure_of("json_schema", FORCED) if has_form else None)
        item = Item(index, str(index), f"digest-{index}", "test")
        asked.append(Request(item, tuple(pair.tokenizer.render(chat)), 24, sampling))
    packed, rounds = run(pair, asked)
    plain, _ = run(pair, asked, draft_length=0)
    assert {n: a.token_ids for n, a in packed.items()} == {n: a.token_ids for n, a in plain.items()}
    assert any(are_packed(rounds))
    for all_tokens, used, got in rounds:
        assert got == (used if used <= 0.9 * all_tokens else all_tokens)


def test_rounds_of_states_are_whole(some_look_up):
    asked = requests(HYBRID)
    plain, _ = run(load_case(HYBRID).pair, asked, draft_length=0)
    some_look_up(asked, plain)
    looked, rounds = run(alone(HYBRID), asked, lookup=True)
    assert {n: a.token_ids for n, a in looked.items()} == {n: a.token_ids for n, a in plain.items()}
    assert not any(are_packed(rounds))
    assert any(used < all_tokens for all_tokens, used, _ in rounds)


@pytest.mark.parametrize("shapes", [WHOLE, Shapes(fixed=(16, 8))])
def test_where_bits_would_be_others_no_round_is_packed(some_look_up, shapes):
    asked = requests(DENSE)
    plain, _ = run(load_case(DENSE).pair, asked, draft_length=0)
    some_look_up(asked, plain)
    _, rounds = run(alone(DENSE), asked, lookup=True, shapes=shapes, draft_length=7)
    assert not any(are_packed(rounds))
