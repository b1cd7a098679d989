"""A step may have rows behind those of the slots, as on a GPU, which change no bit."""

import mlx.core as mx
import pytest
from golden_cases import GREEDY_RUNS, load_case

from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.passes import Passes
from dspark_batch.models.target import Target
from dspark_batch.types import Item, Request


@pytest.fixture(params=["qwen3_vanilla", "gemma4_vanilla", "qwen35_dflash"])
def case(request):
    return load_case(request.param)


def with_spare(monkeypatch, count):
    monkeypatch.setattr(Target, "spare", lambda self, slots, width: count)


def steps(pair):
    """Run two steps; give the logits and what is cached."""
    passes = Passes(pair.target, NoDrafter())
    cache = pair.target.make_cache(2, 0)
    cache.reserve(40)
    found = []
    for tokens, counts in (([[5, 6, 7], [8, 9, 0]], [3, 2]), ([[4], [3]], [1, 1])):
        logits, _ = passes.run(cache, mx.array(tokens))
        cache.keep(mx.array(counts))
        found.append(logits)
    parts = [part for slot, end in ((0, 4), (1, 3)) for part in cache.snapshot(slot, 0, end).arrays]
    return [*found, *parts]


@pytest.mark.parametrize("count", [1, 6])
def test_spare_rows_change_no_bit_and_are_cut(case, count, monkeypatch):
    with_spare(monkeypatch, 0)
    known = steps(case.pair)
    with_spare(monkeypatch, count)
    found = steps(case.pair)
    assert [a.shape for a in found] == [a.shape for a in known]
    assert all(mx.array_equal(a, b) for a, b in zip(found, known, strict=True))


@pytest.mark.parametrize("draft_length", [0, 7])
def test_they_change_no_answer(case, draft_length, monkeypatch):
    def answers():
        requests = [
            Request(Item(n, str(n), f"digest-{n}", f"test:{n}"), case.prompt(run), 9 + n)
            for n, run in enumerate(GREEDY_RUNS)
        ]
        engine = Engine(case.pair, slots=2, draft_length=draft_length)
        return {a.item.index: a.token_ids for a in engine.generate(requests)}

    with_spare(monkeypatch, 0)
    known = answers()
    with_spare(monkeypatch, 3)
    assert answers() == known


def test_a_cpu_needs_none(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    target = load_case("qwen3_vanilla").pair.target
    assert target.spare(3, 5) == 0
