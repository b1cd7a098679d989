"""Penalties, biases and least lengths: exact under speculation, and nobody else's business."""

from collections import Counter
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from golden_cases import load_case
from grids import grid

from dspark_batch.answers.steering import wish_of
from dspark_batch.baseline.margins import margins
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import prefill_alone
from dspark_batch.engine.shapes import Shapes
from dspark_batch.errors import UsageError
from dspark_batch.numerics import steering
from dspark_batch.numerics.steering import ANY, NOBODY, Counted, Edits, Penalties, Steering, Words
from dspark_batch.pair import load_pair
from dspark_batch.types import Failure, Item, Request, Sampling

LENGTH = 14
PENALTIES = {
    "frequency": {"frequency_penalty": -1.5},
    "presence": {"presence_penalty": -1.1},
    "repetition": {"repetition_penalty": 1.3},
    "all": {
        "frequency_penalty": 0.3,
        "presence_penalty": 0.4,
        "repetition_penalty": 0.8,
        "logit_bias": ((5, 3.0), (11, -100.0), (17, 1.5)),
    },
}


def case():
    return load_case("qwen3_vanilla")


def requests(temperature=0.0, **choices):
    """Five items; the one in the middle wants nothing changed."""
    return [
        Request(
            Item(i, str(i), f"digest-{i}", f"test:{i}"),
            case().prompt(f"greedy{i % 3}")[: 5 + i],
            LENGTH,
            Sampling(temperature=temperature, **(choices if i != 2 else {})),
        )
        for i in range(5)
    ]


def ids(outcomes):
    return {outcome.item.index: outcome.token_ids for outcome in outcomes}


@cache
def decode(temperature=0.0, choices=(), **settings):
    """Answer the five items; token ids by index."""
    return ids(Engine(case().pair, **settings).generate(requests(temperature, **dict(choices))))


def frozen(choices):
    return tuple(choices.items())


def slowly_penalised(logits, sampling, prompt_ids, said):
    """vLLM's rules, one token of the vocabulary after the other."""
    logits = [float(x) for x in logits]
    for token, bias in sampling.logit_bias:
        logits[token] = float(np.float32(logits[token]) + np.float32(bias))
    counts = Counter(said)
    for token in {*prompt_ids, *said}:
        above, by = logits[token] > 0, np.float32(sampling.repetition_penalty)
        logits[token] = float(np.float32(logits[token]) / by if above else logits[token] * by)
    for token, count in counts.items():
        logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return logits


@pytest.mark.parametrize("name", PENALTIES)
def test_each_token_is_the_likeliest_by_the_definition(name):
    answers = decode(choices=frozen(PENALTIES[name]), slots=3)
    passes = Passes(case().pair.target, NoDrafter())
    usual = decode(slots=3)
    changed = [index for index in answers if answers[index] != usual[index]]
    assert changed
    for index in changed[:2]:
        request, said = requests(**PENALTIES[name])[index], answers[index]
        for at, token in enumerate(said):
            raw = prefill_alone(passes, Shapes(), (*request.prompt_ids, *said[:at])).logits[0]
            slow = slowly_penalised(raw.tolist(), request.sampling, request.prompt_ids, said[:at])
            assert slow[token] == pytest.approx(max(slow), abs=1e-4)


@pytest.mark.parametrize(
    ("temperature", "settings"),
    grid([0.8, 0.0], [{}, {"slots": 4, "draft_length": 3}, {"slots": 5}]),
)
def test_neither_drafts_nor_neighbours_change_a_steered_answer(temperature, settings):
    choices = frozen(PENALTIES["all"])
    plain = decode(temperature, choices, draft_length=0)
    assert decode(temperature, choices, **settings) == plain
    assert plain[2] == decode(temperature, draft_length=0)[2]  # who wants nothing gets nothing
    assert plain != decode(temperature, draft_length=0)


def test_drafts_made_ahead_wait_until_the_answer_is_known():
    choices = frozen(PENALTIES["all"])
    ahead = decode(0.8, choices, slots=4, drafts_ahead=True)
    assert ahead == decode(0.8, choices, draft_length=0)


def test_a_penalty_that_counts_drafts_behind_the_row_is_seen(monkeypatch):
    choices = frozen(PENALTIES["frequency"])
    plain = decode(choices=choices, draft_length=0)
    real = steering._penalised

    def all_drafts(logits, drafts, rows, penalties):
        return real(logits, drafts, mx.full(rows.shape, drafts.shape[1]), penalties)

    monkeypatch.setattr(steering, "_penalised", all_drafts)
    engine = Engine(case().pair, slots=4)
    assert ids(engine.generate(requests(**dict(choices)))) != plain


def test_the_rejection_rule_draws_from_what_is_left():
    banned = tuple((token, -100.0) for token in range(40))
    answers = list(
        Engine(case().pair, sampling="rejection").generate(requests(1.0, logit_bias=banned))
    )
    assert all(t >= 40 for a in answers if a.item.index != 2 for t in a.token_ids)
    assert sum(sum(a.num_accepted) for a in answers) > 0


def test_min_tokens_holds_every_stop_token_back():
    plain = decode(draft_length=0)
    stop = plain[0][3]
    asked = requests(stop_ids=frozenset({stop}), min_tokens=6)
    for settings in ({"draft_length": 0}, {"slots": 4}):
        (answer, *_) = sorted(
            Engine(case().pair, **settings).generate(asked), key=lambda a: a.item.index
        )
        assert stop not in answer.token_ids[:6]
        assert answer.token_ids[:3] == plain[0][:3]


def test_a_stop_token_that_no_vocabulary_has_changes_nothing_and_no_memory():
    plain, stop_ids = decode(draft_length=0), frozenset({10**6, 10**12, 10**30})
    (asked, *_) = requests(stop_ids=stop_ids, min_tokens=10**20)
    pair = case().pair
    vocab_size = pair.target.facts.vocab_size
    assert all(token < vocab_size for token, *_ in wish_of(pair, asked).edits)
    (answer,) = Engine(pair).generate([asked])
    assert answer.token_ids == plain[0]


def test_the_audits_margin_knows_what_was_changed():
    asked = requests(**PENALTIES["all"])[1]
    answer = decode(choices=frozen(PENALTIES["all"]), slots=3)[1]
    for at, token in enumerate(answer):
        assert margins(case().pair, asked, answer[:at], (token, token))[1] == pytest.approx(
            0, abs=1e-4
        )


def test_a_bias_of_a_token_that_is_not_there_fails_its_item_only():
    good, bad = requests()[:2]
    bad = Request(bad.item, bad.prompt_ids, 4, Sampling(logit_bias=((10**6, 1.0),)))
    outcomes = {o.item.index: o for o in Engine(case().pair, slots=2).generate([good, bad])}
    assert outcomes[0].token_ids == decode(slots=3)[0]
    assert isinstance(outcomes[1], Failure)
    assert "logit_bias names token 1000000, and the vocabulary has" in outcomes[1].message


def test_bad_words_need_a_tokenizer():
    (asked, *_) = requests(bad_words=("a",))
    with pytest.raises(UsageError, match=r"bad words \['a'\] need a tokenizer"):
        list(Engine(case().pair).generate([asked]))


def test_without_wishes_nothing_is_steered(monkeypatch):
    monkeypatch.setattr(Steering, "__call__", None)
    assert decode.__wrapped__(0.8, slots=2) == decode(0.8, draft_length=0)


@cache
def tiny():
    return load_pair("tiny", dtype="float32")


def said(prompt, max_tokens=30, draft_length=None, **choices):
    prompt_ids = tuple(tiny().tokenizer.render([{"role": "user", "content": prompt}]))
    item = Item(0, "0", "digest", "test:0")
    request = Request(item, prompt_ids, max_tokens, Sampling(**choices))
    (answer,) = Engine(tiny(), draft_length=draft_length).generate([request])
    assert not isinstance(answer, Failure), answer.message
    return answer


ASKED = 'Spell "cat" backwards.'


def test_a_bad_word_is_never_said():
    usual = said(ASKED).text
    word = usual.split()[0]
    for draft_length in (None, 0):
        answer = said(ASKED, draft_length=draft_length, bad_words=(word,))
        assert answer.text != usual
        assert word not in answer.text
    assert said(ASKED, bad_words=(word,)).token_ids == answer.token_ids


def test_an_answer_that_may_not_end_goes_on():
    usual = said(ASKED)
    assert usual.finish_reason == "stop"
    for draft_length in (None, 0):
        on = said(ASKED, ignore_eos=True, draft_length=draft_length)
        assert (on.finish_reason, len(on.token_ids)) == ("length", 30)
        assert on.token_ids[: len(usual.token_ids)] == usual.token_ids
    longer = said(ASKED, min_tokens=len(usual.token_ids) + 2)
    assert len(longer.token_ids) > len(usual.token_ids) + 2


def test_a_stop_string_of_the_first_tokens_does_not_end_the_answer():
    usual = said(ASKED)
    stop = usual.text[:2]
    assert said(ASKED, stop=(stop,)).text == ""
    for draft_length in (None, 0):
        answer = said(ASKED, stop=(stop,), min_tokens=4, draft_length=draft_length)
        assert len(answer.token_ids) > 4
        assert answer.text.startswith(stop)


# The arrays by themselves: V = 6, two slots of which the second wants nothing.


def steered(logits, drafts, **parts):
    positions = mx.array([parts.pop("position", 0), 0])
    changed = Steering(positions, **parts)(mx.array(logits), mx.array(drafts, dtype=mx.int32))
    assert mx.array_equal(changed[1], mx.array(logits)[1])
    return changed[0].tolist()


FLAT = [[[1.0] * 6] * 3] * 2  # two slots, three rows


def test_a_value_holds_until_its_position():
    edits = Edits(mx.array([[4], [0]]), mx.array([[-mx.inf], [0.0]]), mx.array([[3], [0]]))
    rows = steered(FLAT, [[0, 0], [0, 0]], edits=edits, position=1)
    assert [row[4] for row in rows] == [-mx.inf, -mx.inf, 1.0]
    assert all(row[:4] == [1.0] * 4 for row in rows)


def test_a_word_may_not_be_completed_by_answer_and_drafts():
    words = Words(
        mx.array([[[1, 2], [ANY, ANY]], [[ANY, ANY]] * 2]),
        mx.array([[3, 5], [0, 0]]),
        mx.array([[NOBODY, 1], [NOBODY, NOBODY]]),
        mx.array([[True, True], [False, False]]),
    )
    rows = steered(FLAT, [[2, 1], [0, 0]], words=words)
    assert [row[3] for row in rows] == [1.0, -mx.inf, 1.0]  # behind 1 2, and nowhere else
    assert [row[5] for row in rows] == [-mx.inf] * 3


def test_a_row_counts_the_answer_and_the_drafts_before_it():
    penalties = Penalties(
        mx.array([1.0, 1.0]),
        mx.array([0.25, 0.0]),
        mx.array([0.5, 0.0]),
        Counted(mx.array([[1, 1], [0, 0]]), mx.array([[1.0, 1.0], [0.0, 0.0]])),
        Counted(mx.zeros((2, 0), dtype=mx.int32), mx.zeros((2, 0))),
    )
    rows = steered(FLAT, [[1, 4], [1, 1]], penalties=penalties)
    assert [row[1] for row in rows] == [0.0, -0.25, -0.25]
    assert [row[4] for row in rows] == [1.0, 1.0, 0.25]
