"""Parts of an answer that grows, put together, are the answer: reasoning and text."""

import random

import pytest
from fakes import fake_steps_opener

from dspark_batch.serve.growing import Growing, Unkept
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Item, Partial, Request, Said, Sampling

MARKS = ("<think>", "</think>")
PARTS = ["<think>", "</think>", "<", "/think>", "\n", " ", "so", "4", "think", ">", "END", "EN"]
SPEC = Spec(inputs=("live",), out="-")


def split(text):
    """Tell reasoning and answer apart, as models do that think."""
    if not text.lstrip().startswith(MARKS[0]):
        return Said(None, text)
    reasoning, _, answer = text.lstrip().removeprefix(MARKS[0]).partition(MARKS[1])
    return Said(reasoning.strip("\n"), answer.lstrip("\n"))


def decode(token_ids):
    return "".join(PARTS[i] for i in token_ids)


def growing(stops=(), decode=decode):
    opened = fake_steps_opener()()._replace(split=split, decode=decode, marks=MARKS)
    item = Item(0, "live", "d", "request", {"body": {"messages": []}})
    return Growing(Request(item, (1,), 99, Sampling(stop=stops)), SPEC, opened)


def completion(text, token_ids=(0,)):
    said = split(text)
    item = Item(0, "live", "d", "request")
    return Completion(item, said.answer, tuple(token_ids), "stop", 1, reasoning=said.reasoning)


@pytest.mark.parametrize("stops", [(), ("END",)], ids=str)
def test_all_deltas_together_are_reasoning_and_text(stops):
    rng, seen = random.Random(3), set()
    for _ in range(1500):
        ids = rng.choices(range(len(PARTS)), k=rng.randint(1, 9))
        if rng.random() < 0.5:
            ids = [*rng.choices([4, 5], k=rng.randint(0, 2)), 0, *ids]
        one, deltas, place = growing(stops), [], 0
        while place < len(ids) - 1:
            place = min(len(ids) - 1, place + rng.randint(1, 3))
            deltas.append(one.add(Partial(tuple(ids[:place]), (False,) * place)))
        text = decode(ids)
        whole = completion(text[: text.find("END")] if stops and "END" in text else text)
        deltas.append(one.end(whole))
        reasoning, answer = ("".join(parts) for parts in zip(*deltas, strict=True))
        assert (reasoning, answer) == (whole.reasoning or "", whole.text), ids
        seen.add((bool(reasoning), bool(answer), len([d for d in deltas if any(d)]) > 1))
    assert len(seen) >= 6


def test_a_tokenizer_that_takes_back_what_it_said_is_told():
    one = growing(decode=lambda ids: "ab"[: len(ids)] if len(ids) < 3 else "xyz")
    assert one.add(Partial((1, 2), (False, False))).text == "ab"
    with pytest.raises(Unkept):
        one.end(completion("xyz"))
