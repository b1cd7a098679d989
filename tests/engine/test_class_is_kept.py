"""In a shape class, no pass outside of it ever runs, whatever the load."""

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.engine.engine import Engine
from dspark_batch.engine.shapes import Shapes
from dspark_batch.types import Item, Request

CLASS = Shapes(
    steps=((2, 4), (2, 8), (4, 8), (8, 2), (8, 8)),
    prefill=((1, 16), (2, 16), (2, 32)),
    least_capacity=64,
)


class Spy:
    """A target that notes the passes it runs; one outside the class would give other logits."""

    def __init__(self, whole, shapes):
        self._whole, self._shapes = whole, shapes
        self.seen = set()

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def __call__(self, tokens, caches):
        shape = tuple(tokens.shape)
        self.seen.add((*shape, caches[0]._extent.capacity))
        logits, features = self._whole(tokens, caches)
        if shape not in self._shapes.steps + self._shapes.prefill:
            logits = logits[..., ::-1]
        return logits, features


def requests(count=9):
    case = load_case("qwen3_vanilla")
    ids = [t for run in ("greedy0", "greedy1") for t in case[f"{run}.output_ids"].tolist()]
    shared = tuple(ids[:18])
    prompts = [(*(shared if n % 2 else ()), *ids[3 * n : 5 + 9 * n]) for n in range(count)]
    return [
        Request(Item(n, str(n), f"d{n}", f"t:{n}"), prompt, 4 + 5 * (n % 4))
        for n, prompt in enumerate(prompts)
    ]


def plain(request):
    """What mlx-lm's model says, one token after the other, without any cache."""
    model, ids = load_case("qwen3_vanilla").pair.target.model, list(request.prompt_ids)
    for _ in range(request.max_tokens):
        ids.append(mx.argmax(model(mx.array([ids]))[0, -1]).item())
    return tuple(ids[len(request.prompt_ids) :])


@pytest.mark.parametrize(("slots", "draft_length"), [(1, 0), (1, 7), (2, 3), (5, 1), (8, 7)])
def test_only_passes_of_the_class_run(slots, draft_length):
    pair = load_case("qwen3_vanilla").pair
    spy = Spy(pair.target, CLASS)
    engine = Engine(pair._replace(target=spy), slots=slots, draft_length=draft_length, shapes=CLASS)
    answers = {c.item.index: c.token_ids for c in engine.generate(requests())}
    assert answers == {r.item.index: plain(r) for r in requests()}
    assert {(slots, width) for slots, width, _ in spy.seen} <= {*CLASS.steps, *CLASS.prefill}
    assert min(capacity for *_, capacity in spy.seen) >= CLASS.least_capacity
