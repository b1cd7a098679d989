"""Rounds over contexts several windows long: where rolling caches go wrong without a word.

A stock rolling cache cannot take back tokens once it has wrapped, and a one-token step after
taking some back sees rejected entries. Both happen in rounds with few or no drafts.
"""

import random
from functools import cache

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.engine.engine import Engine
from dspark_batch.types import Item, Request

CASES = ["gemma4_vanilla", "gemma4_gated"]
WINDOW = 16
TOLERANCE = 1e-4


def long_prompt(case):
    """Five windows of tokens that the target itself finds likely."""
    ids = [t for run in ("greedy0", "greedy1") for t in case[f"{run}.output_ids"].tolist()]
    return ids[: 5 * WINDOW + 3]


def fresh_logits(case, tokens):
    """mlx-lm's own forward over everything, without any cache."""
    return case.pair.target.model(mx.array([tokens]))[0]


@cache
def continued(name, count):
    """The prompt and `count` greedy tokens, each from a forward over everything before it."""
    case = load_case(name)
    tokens = long_prompt(case)
    for _ in range(count):
        tokens = [*tokens, mx.argmax(fresh_logits(case, tokens)[-1]).item()]
    return tokens


def test_the_window_is_really_shorter_than_the_contexts():
    case = load_case("gemma4_vanilla")
    assert case.pair.target.model.args.sliding_window == WINDOW
    assert len(long_prompt(case)) > 5 * WINDOW


@pytest.mark.parametrize("name", CASES)
def test_rounds_of_any_width_give_the_logits_of_a_fresh_forward(name):
    case, chance = load_case(name), random.Random(name)
    target, tokens = case.pair.target, list(long_prompt(case))
    cached = target.make_cache(1, 0)
    cached.reserve(256)
    target(mx.array([tokens[:-1]]), cached)
    cached.keep(mx.array([len(tokens) - 1]))
    for number in range(15):
        drafts = [chance.randrange(192) for _ in range(0 if number % 3 == 2 else number % 7)]
        logits, _ = target(mx.array([[tokens[-1], *drafts]]), cached)
        fresh = fresh_logits(case, tokens + drafts)[-1 - len(drafts) :]
        assert mx.abs(logits[0] - fresh).max().item() < TOLERANCE, f"round {number}"
        stay = chance.randint(0, len(drafts))
        cached.keep(mx.array([1 + stay]))
        tokens += [*drafts[:stay], mx.argmax(fresh[stay]).item()]


@pytest.mark.parametrize("name", CASES)
def test_what_did_not_stay_changes_no_bit_behind_a_wrapped_window(name):
    case, logits = load_case(name), []
    for junk in ([], [77] * 7, [3] * 20):
        cached = case.pair.target.make_cache(1, 0)
        cached.reserve(256)
        case.pair.target(mx.array([long_prompt(case)]), cached)
        cached.keep(mx.array([len(long_prompt(case))]))
        if junk:
            case.pair.target(mx.array([junk]), cached)
        logits.append(case.pair.target(mx.array([[5]]), cached)[0])
    assert mx.array_equal(logits[0], logits[1])
    assert mx.array_equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("name", "threshold"), [("gemma4_vanilla", 0.0), ("gemma4_gated", 0.6), ("gemma4_vanilla", 1.0)]
)
def test_the_engine_gives_the_ids_of_fresh_forwards(name, threshold):
    case, expected = load_case(name), continued(name, 16)
    prompt = tuple(long_prompt(case))
    engine = Engine(case.pair, confidence_threshold=threshold)
    (completion,) = engine.generate([Request(Item(0, "0", "d", "t:1"), prompt, 16)])
    assert list(completion.token_ids) == expected[len(prompt) :]
    if threshold == 1.0:
        assert set(completion.num_drafted) == {0}
