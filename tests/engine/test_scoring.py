"""Prompts, and answers that are given: what the target thought of their tokens."""

import math
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from golden_cases import DENSE, load_case

from dspark_batch.engine import prefill, shapes
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.passes import Passes
from dspark_batch.numerics.scores import score
from dspark_batch.types import MOST_LOGPROBS, Failure, Given, Item, Request, Sampling

SHARED = 20  # tokens with which all prompts begin
ANSWERS = [6, 1, 0, 17]  # tokens of each


def case(name="qwen3_vanilla"):
    return load_case(name)


def ids_of(n, length):
    text = [*case().prompt("greedy0"), *case().answer("greedy0"), *case().answer("greedy1")]
    return (*text[:SHARED], *text[SHARED + 3 * n :][: length - SHARED])


def scored(n, **told):
    """Ask for the scores of an answer; prompts begin alike."""
    prompt, answer = ids_of(n, SHARED + 2 + 3 * n), ids_of(n + 1, SHARED + ANSWERS[n])[SHARED:]
    item = Item(n, str(n), f"digest-{n}", f"test:{n}")
    sampling = Sampling(**{"logprobs": 0} | told)
    return Request(item, prompt, max(1, len(answer)), sampling, Given("as it is", answer))


def generated(n, **told):
    item = Item(10 + n, str(n), f"digest-{n}", f"test:{n}")
    return Request(item, ids_of(n, SHARED + 5 + n), 9, Sampling(**told))


def answered(requests, **settings):
    outcomes = Engine(case().pair, **settings).generate(requests)
    return {outcome.item.index: outcome for outcome in outcomes}


@cache
def one_by_one():
    """Score each answer alone, without a prefix cache."""
    alone = [answered([scored(n)], prefix_positions=0) for n in range(len(ANSWERS))]
    return {index: answer.logprobs for one in alone for index, answer in one.items()}


def by_mlx_lm(ids):
    """The log-probabilities [T-1, V] of what follows each token, by mlx-lm's own pass."""
    logits = case().pair.target.model(mx.array([ids]))[0, :-1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def assert_near(told, logprobs, ids, num_top):
    """Compare with rows [N, V] for the last N of some ids."""
    np.testing.assert_allclose(
        told.token_logprobs[-len(logprobs) :],
        logprobs[np.arange(len(logprobs)), list(ids)[-len(logprobs) :]],
        atol=1e-4,
    )
    likeliest = -np.sort(-logprobs, axis=-1)[:, :num_top]
    np.testing.assert_allclose(told.top_logprobs, likeliest.ravel(), atol=1e-4)
    again = np.take_along_axis(logprobs, np.array(told.top_ids, int).reshape(-1, num_top), axis=-1)
    np.testing.assert_allclose(again, likeliest, atol=1e-4)


def test_a_given_answer_is_scored_as_by_mlx_lms_own_pass():
    asked = [scored(n, logprobs=3) for n in range(len(ANSWERS))]
    for index, answer in answered(asked, slots=4).items():
        request = asked[index]
        given = request.given.token_ids
        assert (answer.text, answer.token_ids) == ("as it is", given)
        assert (answer.finish_reason, answer.accept_lengths) == ("scored", ())
        assert len(answer.logprobs.token_logprobs) == len(given) == ANSWERS[index]
        if given:
            rows = by_mlx_lm([*request.prompt_ids, *given])[-len(given) :]
            assert_near(answer.logprobs, rows, given, 3)
        else:
            assert answer.logprobs.top_logprobs == ()


def test_a_prompt_is_scored_as_by_mlx_lms_own_pass_while_its_answer_is_drafted():
    asked = [generated(n, prompt_logprobs=2, logprobs=1) for n in range(3)]
    silent = answered([generated(n) for n in range(3)], slots=2)
    for index, answer in answered(asked, slots=2).items():
        ids = asked[index - 10].prompt_ids
        told = answer.prompt_logprobs
        assert told.token_ids == ids
        assert told.token_logprobs[0] is None
        assert_near(told, by_mlx_lm(ids), ids, 2)
        assert_near(
            answer.logprobs,
            by_mlx_lm([*ids, *answer.token_ids])[len(ids) - 1 :],
            answer.token_ids,
            1,
        )
        assert answer.token_ids == silent[index].token_ids
        assert silent[index].prompt_logprobs is None
        assert sum(answer.num_accepted) > 0


@pytest.mark.parametrize("run", ["greedy0", "greedy1"])
@pytest.mark.parametrize("name", DENSE[:2])
def test_they_are_those_of_the_recorded_logits(name, run):
    """The reference recorded the target's logits of every round of its speculation."""
    golden = case(name)
    prompt, answer = golden.prompt(run), golden.answer(run)
    accepted = golden[f"{run}.rounds.accepted"].tolist()
    rows = [
        row
        for n, a in enumerate(accepted)
        for row in golden[f"{run}.rounds.verify_logits"][n][: a + 1]
    ]
    rows = mx.stack(rows)[: len(answer) - 1]
    expected = score(rows[None], mx.array([answer[1:]]), 0).chosen[0].tolist()
    item = Item(0, "0", "d", "test:0")
    request = Request(item, prompt, len(answer), Sampling(logprobs=0, prompt_logprobs=0))
    (told,) = Engine(golden.pair).generate([request])
    assert list(told.token_ids) == answer
    np.testing.assert_allclose(told.logprobs.token_logprobs[1:], expected, atol=1e-4)
    if run == "greedy0":
        logits = golden["prefill.logits"][None]
        prompt_scores = score(logits[:, :-1], mx.array([prompt[1:]]), 0).chosen[0].tolist()
        np.testing.assert_allclose(
            told.prompt_logprobs.token_logprobs[1:], prompt_scores, atol=1e-4
        )
        first = score(logits[:, -1:], mx.array([answer[:1]]), 0).chosen.item()
        assert told.logprobs.token_logprobs[0] == pytest.approx(first, abs=1e-4)


def test_an_answer_has_the_same_scores_where_it_was_generated_and_where_it_is_given():
    """By rounds with drafts, and by prefill: the same bits."""
    made = answered([generated(n, logprobs=4) for n in range(3)], slots=2)
    given = [
        Request(
            Item(n, str(n), "d", "x"),
            generated(n).prompt_ids,
            9,
            Sampling(logprobs=4),
            Given("", made[10 + n].token_ids),
        )
        for n in range(3)
    ]
    again = answered(given, slots=3)
    assert [again[n].logprobs for n in range(3)] == [made[10 + n].logprobs for n in range(3)]


@pytest.mark.parametrize(
    "settings", [{"slots": 4}, {"slots": 2, "draft_length": 0}, {"prefix_positions": 0}], ids=str
)
def test_neither_neighbours_nor_pieces_nor_what_is_cached_change_a_score(settings, monkeypatch):
    monkeypatch.setattr(shapes, "_WIDTH", 7)
    asked = [scored(n) for n in range(len(ANSWERS))] + [generated(0, prompt_logprobs=0)]
    answers = answered(asked, **settings)
    assert {n: answers[n].logprobs for n in one_by_one()} == one_by_one()
    cached = [answers[n].cached_tokens for n in one_by_one()]
    assert all(n == 0 for n in cached) == ("prefix_positions" in settings)
    assert answers[10].cached_tokens == 0  # a cached position has no logits


def test_a_long_prompt_has_never_all_its_logits_at_once(monkeypatch):
    vocab_size, most = case().pair.target.facts.vocab_size, 12
    monkeypatch.setattr(prefill, "_MOST_LOGITS", most * vocab_size)
    seen, real = [], Passes.run_to

    def watched(self, cache, tokens, at):
        seen.append(at.size)
        return real(self, cache, tokens, at)

    monkeypatch.setattr(Passes, "run_to", watched)
    asked = [scored(n) for n in range(len(ANSWERS))] + [generated(3, prompt_logprobs=0)]
    answers = answered(asked, slots=4)
    assert {n: answers[n].logprobs for n in one_by_one()} == one_by_one()
    assert len(seen) > 3
    assert max(seen) <= most + len(asked)  # the last position of each is read besides


def test_a_short_answer_costs_a_long_prompt_no_narrow_pass(monkeypatch):
    widths, real = [], Passes.run_to

    def watched(self, cache, tokens, at):
        widths.append((tokens.shape[1], at.shape[1]))
        return real(self, cache, tokens, at)

    monkeypatch.setattr(prefill, "_MOST_LOGITS", 12 * 192)
    monkeypatch.setattr(Passes, "run_to", watched)
    answered([scored(0), scored(1)], slots=2, prefix_positions=0)
    assert widths == [(27, 7)]


def test_scores_by_the_logits_of_another_position_are_seen(monkeypatch):
    real = prefill.score
    late = lambda logits, tokens, num_top: real(mx.roll(logits, 1, axis=1), tokens, num_top)  # noqa: E731
    monkeypatch.setattr(prefill, "score", late)
    assert answered([scored(0)])[0].logprobs != one_by_one()[0]


def test_which_of_equal_tokens_are_told_does_not_depend_on_how_many_are_asked():
    rng = np.random.default_rng(3)
    logits = mx.array(rng.integers(0, 4, (2, 3, 64)).astype(np.float32))
    tokens = mx.zeros((2, 3), dtype=mx.int32)
    most = score(logits, tokens, MOST_LOGPROBS)
    for num_top in (1, 2, 5, 19):
        fewer = score(logits, tokens, num_top)
        assert mx.array_equal(fewer.top_ids, most.top_ids[..., :num_top])
    assert score(logits[..., :5], tokens, 8).top.shape == (2, 3, 5)


def test_logits_that_are_no_numbers_fail_the_item_alone(monkeypatch):
    real = prefill.score

    def broken(logits, tokens, num_top):
        scores = real(logits, tokens, num_top)
        return scores._replace(chosen=scores.chosen * math.nan)

    monkeypatch.setattr(prefill, "score", broken)
    answers = answered([generated(0), generated(1, prompt_logprobs=0), scored(0)], slots=2)
    assert [isinstance(answers[n], Failure) for n in (10, 11, 0)] == [False, True, True]
    assert "logits are not finite" in answers[11].message
