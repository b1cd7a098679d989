"""The next drafts are on the device before the host reads a round: no byte changes."""

import random

import pytest
from golden_cases import load_case

from dspark_batch.engine.engine import Engine
from dspark_batch.types import Item, Request, Sampling


def work(temperature):
    """List items of mixed lengths, one in three of them greedy."""
    case, rng = load_case("qwen3_vanilla"), random.Random(3)
    ids = [t for run in ("greedy0", "greedy1") for t in case[f"{run}.output_ids"].tolist()]
    return [
        Request(
            Item(n, str(n), f"digest-{n}", f"test:{n}"),
            tuple(ids[start : start + rng.randint(1, 20)]),
            rng.randint(1, 25),
            Sampling(temperature=temperature if n % 3 else 0.0),
        )
        for n in range(30)
        for start in [rng.randrange(len(ids) - 25)]
    ]


def answers(temperature, **settings):
    engine = Engine(load_case("qwen3_vanilla").pair, **settings)
    return {a.item.index: a.token_ids for a in engine.generate(work(temperature))}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("slots", "draft_length"), [(1, 3), (4, 7), (7, 0), (16, 7)])
def test_answers_are_those_of_plain_decoding(temperature, slots, draft_length):
    plain = answers(temperature, slots=7, draft_length=0, drafts_ahead=False)
    settings = {"slots": slots, "draft_length": draft_length}
    assert answers(temperature, **settings, drafts_ahead=True) == plain


def test_drafts_for_who_entered_since_are_made_anew():
    slow, ahead = (
        {a.item.index: a.num_accepted for a in engine.generate(work(0.0))}
        for late in (False, True)
        for engine in [Engine(load_case("qwen3_vanilla").pair, slots=4, drafts_ahead=late)]
    )
    assert ahead == slow  # stale drafts would be accepted less often
