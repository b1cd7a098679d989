"""What an audit measures and compares with: margins, and mlx-lm's own generation."""

import math
from functools import cache

import pytest
from golden_cases import load_case

from dspark_batch.baseline.margins import margins
from dspark_batch.baseline.outside import generate_outside
from dspark_batch.engine.engine import Engine
from dspark_batch.pair import load_pair
from dspark_batch.types import Failure, Item, Request, Sampling

SAMPLINGS = {
    "greedy": Sampling(),
    "coupled": Sampling(temperature=0.9, seed=5),
    "filtered": Sampling(temperature=1.3, top_k=9, top_p=0.9, min_p=0.01),
}


@cache
def pair():
    return load_case("qwen3_vanilla").pair


def request(index=0, **choices):
    prompt = load_case("qwen3_vanilla").prompt("greedy0")[index : index + 6]
    return Request(
        Item(index, str(index), f"digest-{index}", f"test:{index}"), prompt, 8, **choices
    )


def plain(*requests):
    return sorted(
        Engine(pair(), slots=3, draft_length=0).generate(requests), key=lambda o: o.item.index
    )


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_token_that_was_chosen_is_before_all_others(sampling):
    asked = request(sampling=sampling)
    [answer] = plain(asked)
    for at, token in enumerate(answer.token_ids):
        top_2, spread = margins(pair(), asked, answer.token_ids[:at], (token, token))
        assert top_2 > 0
        assert spread == pytest.approx(0, abs=1e-4)  # the pass has another shape than the step's


def test_the_spread_reaches_down_to_the_less_likely_of_two_tokens():
    asked = request()
    [answer] = plain(asked)
    token = answer.token_ids[0]
    others = [margins(pair(), asked, (), (token, other)) for other in range(40)]
    assert all(spread >= top_2 for top_2, spread in others if spread > 1e-4)
    assert max(spread for _, spread in others) > min(s for _, s in others if s > 1e-4)


@pytest.mark.parametrize("nobody", [-1, 10**6])
def test_a_token_outside_the_vocabulary_is_never_near(nobody):
    _, spread = margins(pair(), request(), (), (0, nobody))
    assert math.isinf(spread)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_mlx_lm_gives_what_plain_decoding_gives_in_any_number_of_slots(slots):
    asked = [request(n) for n in range(4)]
    found = sorted(generate_outside(pair(), slots, asked), key=lambda o: o.item.index)
    expected = [(o.token_ids, o.text, o.finish_reason) for o in plain(*asked)]
    assert [(o.token_ids, o.text, o.finish_reason) for o in found] == expected


def test_mlx_lm_pulls_only_what_has_a_slot_and_passes_failures_on():
    pulled = []

    def stream():
        for n in range(4):
            pulled.append(n)
            yield Failure(request(n).item, "bad_record", "") if n == 1 else request(n)

    outcomes = generate_outside(pair(), 1, stream())
    next(outcomes)
    assert pulled == [0]
    assert sorted(o.item.index for o in outcomes) == [1, 2, 3]


def test_a_stop_text_ends_mlx_lms_answer_where_it_ends_ours():
    tiny = load_pair("tiny", dtype="float32")
    prompt = tuple(tiny.tokenizer.render([{"role": "user", "content": 'Spell "cat" backwards.'}]))
    asked = [
        Request(Item(n, str(n), "d", "test:1"), prompt, 30, Sampling(stop=stop))
        for n, stop in enumerate([("Count",), ()])
    ]
    ours = Engine(tiny, slots=2, draft_length=0).generate(asked)
    theirs = generate_outside(tiny, 2, asked)
    answers = [
        {o.item.index: (o.token_ids, o.text, o.finish_reason) for o in outcomes}
        for outcomes in (ours, theirs)
    ]
    assert answers[0] == answers[1]
    assert answers[0][0][0] != answers[0][1][0]
