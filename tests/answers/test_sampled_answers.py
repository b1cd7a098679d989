"""Sampled answers: the reference's recorded runs, and the laws of Losslessness and Independence."""

import dataclasses
from functools import cache

import mlx.core as mx
import pytest
from golden_cases import DENSE, load_case
from grids import grid

import dspark_batch.answers.sampling
from dspark_batch.answers.sampling import noise_key, rule_of
from dspark_batch.answers.sequence import Sequence
from dspark_batch.engine.engine import Engine
from dspark_batch.errors import UsageError
from dspark_batch.numerics.chance import Chance
from dspark_batch.numerics.rules import Greedy
from dspark_batch.types import Item, Request, Sampling

WARM = Sampling(temperature=1.0)
ITEM = Item(0, "a", "digest", "test:1")


class Tape:
    """Chance that hands out the reference's recorded uniforms, in order, each for its purpose."""

    def __init__(self, case, run):
        self.kinds = case[f"{run}.uniform_kind"].tolist()
        self.uniforms = case[f"{run}.uniforms"].tolist()

    def draft_uniform(self, k):
        return self._take(0, 1)

    def accept_uniforms(self, num_drafts):
        return self._take(1, num_drafts)[None]

    def bonus_uniform(self, accepted):
        return self._take(0, 1)

    def _take(self, kind, count):
        assert self.kinds[:count] == [kind] * count
        taken = mx.array(self.uniforms[:count])
        del self.kinds[:count], self.uniforms[:count]
        return taken


@pytest.mark.parametrize(("run", "name"), grid(["sampled_t1", "sampled_t07"], DENSE))
def test_the_references_sampled_runs_come_out_of_its_uniforms(run, name, monkeypatch):
    case = load_case(name)
    tape, recorded = Tape(case, run), case.runs[run]
    monkeypatch.setattr(dspark_batch.answers.sampling, "Chance", lambda *_: tape)
    warm = Sampling(temperature=recorded["temperature"])
    request = Request(ITEM, case.prompt(run), recorded["max_new_tokens"], warm)
    engine = Engine(case.pair, sampling="rejection", drafts_ahead=False)  # the tape has an order
    (completion,) = engine.generate([request])
    rounds = len(completion.accept_lengths)
    assert list(completion.token_ids) == case.answer(run)
    accepted = case[f"{run}.accepted_draft_lengths"].tolist()
    assert list(completion.num_accepted[:-1]) == accepted[: rounds - 1]


@cache
def decode(temperature, seed=0, sampling="coupled", slots=1, filters=(), **settings):
    """Answer five items of different lengths; token ids by index."""
    case = load_case("qwen3_vanilla")
    engine = Engine(case.pair, slots=slots, sampling=sampling, **settings)
    answers = engine.generate(requests(case, temperature, seed, **dict(filters)))
    return {answer.item.index: answer for answer in answers}


def requests(case, temperature, seed=0, **filters):
    prompts = [case.prompt(f"greedy{i % 3}") for i in range(5)]
    return [
        Request(
            ITEM._replace(index=i, custom_id=str(i)),
            ids[: 5 + i],
            8 + 2 * (i % 3),
            Sampling(temperature=temperature * (i != 3), seed=seed, **filters),  # one is greedy
        )
        for i, ids in enumerate(prompts)
    ]


def ids(answers):
    return {index: answer.token_ids for index, answer in answers.items()}


@pytest.mark.parametrize(
    ("temperature", "settings"),
    grid(
        [0.7, 1.0],
        [
            {"draft_length": 7},
            {"draft_length": 2},
            {"slots": 4, "draft_length": 7},
            {"slots": 5, "draft_length": 0},
            {"slots": 3, "confidence_threshold": 0.6},
        ],
    ),
)
def test_coupled_answers_do_not_depend_on_drafts_or_neighbours(temperature, settings):
    plain = decode(temperature, draft_length=0)
    answers = decode(temperature, **settings)
    assert ids(answers) == ids(plain)
    for index, answer in answers.items():
        assert answer.finish_reason == plain[index].finish_reason
        assert 1 + sum(answer.accept_lengths) == len(answer.token_ids)


def test_filtered_answers_do_not_depend_on_drafts_or_neighbours():
    filters = (("top_p", 0.6), ("top_k", 5), ("min_p", 0.05))
    plain = decode(1.5, draft_length=0, filters=filters)
    assert ids(decode(1.5, slots=4, filters=filters)) == ids(plain)
    assert ids(plain) != ids(decode(1.5, draft_length=0))


def test_another_drafter_changes_no_coupled_answer():
    case, other = load_case("qwen3_vanilla"), load_case("qwen3_vanilla").pair
    weights = dict(other.drafter.parameters()["hidden_norm"])
    try:
        other.drafter.hidden_norm.weight = mx.ones_like(weights["weight"])
        answers = list(Engine(case.pair, slots=2).generate(requests(case, 1.0)))
    finally:
        other.drafter.hidden_norm.weight = weights["weight"]
    expected = decode(1.0, draft_length=0)
    assert {a.item.index: a.token_ids for a in answers} == ids(expected)
    ours = [decode(1.0, draft_length=7)[a.item.index].accept_lengths for a in answers]
    assert [a.accept_lengths for a in answers] != ours  # it did draft something else


@pytest.mark.parametrize(("slots", "threshold"), [(4, 0.0), (5, 0.6)])
def test_neighbours_change_no_answer_of_the_rejection_rule(slots, threshold):
    alone = decode(1.0, sampling="rejection", confidence_threshold=threshold)
    together = decode(1.0, sampling="rejection", slots=slots, confidence_threshold=threshold)
    assert ids(together) == ids(alone)


@pytest.mark.parametrize("sampling", ["coupled", "rejection"])
def test_a_greedy_item_among_sampled_ones_stays_greedy(sampling):
    greedy = decode(0.0, draft_length=0)
    assert decode(1.0, sampling=sampling, slots=5)[3].token_ids == greedy[3].token_ids


@pytest.mark.parametrize("sampling", ["coupled", "rejection"])
def test_the_seed_changes_sampled_answers_and_no_greedy_one(sampling):
    one, other = (decode(1.5, seed=seed, sampling=sampling, slots=5) for seed in (0, 1))
    same = [index for index in one if one[index].token_ids == other[index].token_ids]
    assert same == [3]


def test_half_an_answer_is_the_beginning_of_the_whole():
    case = load_case("qwen3_vanilla")
    whole = decode(1.0, draft_length=7)[4].token_ids
    request = requests(case, 1.0)[4]
    for length in (1, 2, 7):
        cut = dataclasses.replace(request, max_tokens=length)
        (answer,) = Engine(case.pair).generate([cut])
        assert answer.token_ids == whole[:length]


def test_a_batch_without_temperatures_pays_for_no_noise():
    request = Request(ITEM, (1, 2), 5)

    def positions():
        return mx.zeros(2, dtype=mx.int32)

    assert isinstance(rule_of("coupled", [Sequence(request, frozenset()), None], positions), Greedy)
    warm = dataclasses.replace(request, sampling=WARM)
    rule = rule_of("coupled", [Sequence(warm, frozenset()), None], positions)
    assert not isinstance(rule, Greedy)


@pytest.mark.parametrize("ahead", [False, True])
def test_every_answer_position_has_noise_of_its_own(ahead, monkeypatch):
    seen = []

    def told(keys, positions):
        seen.extend(positions.tolist())
        return Chance(keys, positions)

    monkeypatch.setattr(dspark_batch.answers.sampling, "Chance", told)
    request = Request(ITEM, (1, 2), 6, WARM)
    engine = Engine(load_case("qwen3_vanilla").pair, draft_length=0, drafts_ahead=ahead)
    (answer,) = engine.generate([request])
    assert seen[: len(answer.token_ids)] == list(range(len(answer.token_ids)))


def test_the_noise_of_an_item_is_named_by_seed_and_identity_not_by_its_place():
    def key(seed=0, **changes):
        item = ITEM._replace(**changes)
        return noise_key(Request(item, (1,), 1, Sampling(seed=seed)))

    assert key() == key(index=7) == key(where="other.jsonl:3") == (50136859, 1130586101)
    others = [key(seed=1), key(custom_id="b"), key(digest="other"), key(sample_index=1)]
    assert len({key(), *others}) == 5


def test_an_unknown_rule_is_refused():
    with pytest.raises(UsageError, match="coupled or rejection"):
        Engine(load_case("qwen3_vanilla").pair, sampling="typical")
