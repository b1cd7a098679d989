"""Log-probabilities: what the target thought, whoever drafted; asking changes no token."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from golden_cases import load_case

from dspark_batch.engine.engine import Engine
from dspark_batch.numerics.rules import Scored
from dspark_batch.numerics.scores import score
from dspark_batch.output.responses import response_line
from dspark_batch.pair import load_pair
from dspark_batch.record.rows import row_of
from dspark_batch.types import Item, Logprobs, Request, Sampling

ASKED = (3, 0, None, 5)  # by item
STEER = (("frequency_penalty", -1.5),)


def case():
    return load_case("qwen3_vanilla")


@cache
def decode(temperature=0.0, asked=ASKED, choices=(), **settings):
    """Answer four items; the answers by index."""
    requests = [
        Request(
            Item(i, str(i), f"digest-{i}", f"test:{i}"),
            case().prompt(f"greedy{i % 3}")[: 5 + i],
            12,
            Sampling(temperature=temperature, logprobs=num_top, **dict(choices)),
        )
        for i, num_top in enumerate(asked)
    ]
    answers = Engine(case().pair, **settings).generate(requests)
    return {answer.item.index: answer for answer in answers}


def told(answers):
    return {index: (answer.token_ids, answer.logprobs) for index, answer in answers.items()}


@pytest.mark.parametrize("settings", [{"slots": 3}, {"slots": 4, "draft_length": 2}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_neither_drafts_nor_neighbours_change_a_log_probability(settings, temperature):
    answers = decode(temperature, **settings)
    assert told(answers) == told(decode(temperature, draft_length=0))
    silent = decode(temperature, asked=(None,) * 4, **settings)
    assert {i: a.token_ids for i, a in answers.items()} == {
        i: a.token_ids for i, a in silent.items()
    }
    assert answers[2].logprobs is None
    assert all(answer.logprobs is None for answer in silent.values())


@pytest.mark.parametrize("choices", [(), STEER], ids=["plain", "steered"])
def test_they_are_those_of_mlx_lms_own_pass(choices):
    for index, answer in decode(0.8, choices=choices, slots=3).items():
        num_top, ids = ASKED[index], answer.token_ids
        if num_top is None:
            continue
        prompt = case().prompt(f"greedy{index % 3}")[: 5 + index]
        logits = case().pair.target.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        own = logprobs[np.arange(len(ids)), list(ids)]
        np.testing.assert_allclose(answer.logprobs.token_logprobs, own, atol=1e-4)
        likeliest = -np.sort(-logprobs, axis=-1)[:, :num_top]
        np.testing.assert_allclose(answer.logprobs.top_logprobs, likeliest.ravel(), atol=1e-4)
        assert len(answer.logprobs.top_ids) == num_top * len(ids)
        if num_top:
            at = np.array(answer.logprobs.top_ids).reshape(len(ids), num_top)
            again = np.take_along_axis(logprobs, at, axis=-1)
            np.testing.assert_allclose(again, likeliest, atol=1e-4)


def test_scores_of_another_row_are_seen(monkeypatch):
    real = Scored.verify

    def late(self, drafts, verify_len, logits):
        decided = real(self, drafts, verify_len, logits)
        self.scores = type(self.scores)(*(mx.roll(each, 1, axis=1) for each in self.scores))
        return decided

    monkeypatch.setattr(Scored, "verify", late)
    assert told(decode.__wrapped__(slots=3)) != told(decode(draft_length=0))


def test_the_likeliest_come_first_and_of_equal_ones_the_lower_id():
    logits = mx.log(mx.array([[[0.1, 0.3, 0.2, 0.3, 0.1]]]))
    scores = score(logits, mx.array([[2]]), 3)
    assert scores.top_ids.tolist() == [[[1, 3, 2]]]
    assert scores.chosen.item() == pytest.approx(np.log(0.2), abs=1e-6)
    assert score(logits, mx.array([[2]]), 0).top.shape == (1, 1, 0)


ITEM = Item(0, "a", "d", "in:1", {"url": "/v1/chat/completions", "body": {"messages": []}})


def test_a_row_and_an_openai_line_have_the_texts_of_tokens():
    pair = load_pair("tiny", dtype="float32")
    prompt = tuple(pair.tokenizer.render([{"role": "user", "content": 'Spell "cat" backwards.'}]))
    request = Request(ITEM, prompt, 40, Sampling(logprobs=2))
    (answer,) = Engine(pair).generate([request])
    row = row_of(answer)
    assert "".join(row["logprobs"]["tokens"][:-1]) == answer.text
    assert row["logprobs"]["top_tokens"][::2] == row["logprobs"]["tokens"]  # it was greedy
    assert row["logprobs"]["top_logprobs"][::2] == row["logprobs"]["token_logprobs"]
    body = response_line(ITEM, row, "tiny", 0)["response"]["body"]
    content = body["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in content] == row["logprobs"]["tokens"]
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert [len(each["top_logprobs"]) for each in content] == [2] * len(answer.token_ids)


def test_a_text_has_openais_older_shape():
    item = ITEM._replace(record={"url": "/v1/completions", "body": {"prompt": "x"}})
    pair = Logprobs(
        (5, 7), ("a", "bc"), (-0.5, -1.0), (5, 6, 7, 8), ("a", "x", "bc", "y"), (-0.5, -2, -1, -3)
    )
    (answer,) = decode(asked=(None,)).values()
    row = row_of(answer._replace(item=item, token_ids=(5, 7), logprobs=pair))
    body = response_line(item, row, "tiny", 0)["response"]["body"]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "bc"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"a": -0.5, "x": -2}, {"bc": -1, "y": -3}],
        "text_offset": [0, 1],
    }
