"""Prompts in one pass, in pieces, and behind what is stored: always the same logits and caches."""

import mlx.core as mx
import pytest
from golden_cases import load_case
from grids import grid

from dspark_batch import device
from dspark_batch.caches.prefix_cache import PrefixCache, chunks_of
from dspark_batch.engine import shapes
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import prefill, prefill_alone, whole
from dspark_batch.engine.shapes import Shapes

ANY, ONE = Shapes(), Shapes(fixed=(4, 16))
PAIRS = ["qwen3_vanilla", "gemma4_vanilla", "qwen35_dflash", "qwen35_moe_dflash"]


@pytest.fixture(autouse=True)
def _short_passes(monkeypatch):
    """Prompts of these tests go in several pieces."""
    monkeypatch.setattr(shapes, "_WIDTH", 16)


@pytest.fixture(params=PAIRS)
def pair(request):
    return load_case(request.param).pair


def prompts(count=4, shared=20):
    case = load_case("qwen3_vanilla")
    ids = [t % 128 for run in ("greedy0", "greedy1") for t in case[f"{run}.output_ids"].tolist()]
    return [tuple(ids[:shared] + ids[10 + 3 * n : 15 + 7 * n]) for n in range(count)]


def passes_of(pair):
    """Make passes whose drafter's contexts have the same bits, too."""
    return Passes(pair.target, pair.drafter, drafts_decide=True)


def finish(passes):
    count = 0
    while True:
        try:
            next(passes)
            count += 1
        except StopIteration as through:
            return through.value, count + 1


def together(pair, asked, cache, allowed=ANY):
    for ids in asked:
        cache.expect(chunks_of(ids))
    return finish(prefill(passes_of(pair), allowed, [*map(whole, asked)], cache))


def assert_same(filled, pair, asked, allowed=ANY):
    """Compare with each prompt alone, bit for bit."""
    for slot, ids in enumerate(asked):
        alone = prefill_alone(passes_of(pair), allowed, ids)
        assert mx.array_equal(filled.logits[slot], alone.logits[0])
        for mine, other in ((filled.cache, alone.cache), (filled.context, alone.context)):
            assert mine.lengths[slot].item() == len(ids)
            found, known = mine.snapshot(slot, 0, len(ids)), other.snapshot(0, 0, len(ids))
            for a, b in zip(found.arrays, known.arrays, strict=True):
                assert mx.array_equal(a, b)


@pytest.mark.parametrize("allowed", [ANY, ONE], ids=["any", "one"])
def test_several_prompts_are_as_each_alone(pair, allowed):
    asked = prompts()
    filled, _ = together(pair, asked, PrefixCache(0), allowed)
    assert filled.cached == [0, 0, 0, 0]
    assert_same(filled, pair, asked, allowed)


@pytest.mark.parametrize(("pair", "width"), grid(PAIRS, [1, 7, 64]), indirect=["pair"])
def test_the_pieces_that_prompts_go_in_change_no_bit(pair, width, monkeypatch):
    asked = prompts(2, shared=60)
    filled, _ = together(pair, asked, PrefixCache(0))
    monkeypatch.setattr(shapes, "_WIDTH", width)
    assert_same(filled, pair, asked)


def test_a_shared_beginning_is_computed_once_and_changes_nothing(pair):
    cache, asked = PrefixCache(1000), prompts()
    filled, _ = together(pair, asked, cache)
    assert filled.cached == [16, 16, 16, 16]
    assert_same(filled, pair, asked)
    again, _ = together(pair, asked, cache)  # now all of each prompt has been seen before
    assert all(n >= 16 for n in again.cached)
    assert max(again.cached) > 16
    assert_same(again, pair, asked)


def test_groups_that_share_less_with_each_other_than_within_compute_nothing_twice():
    pair, cache = load_case("qwen3_vanilla").pair, PrefixCache(1000)
    (ids,) = prompts(1, shared=60)
    groups = [ids[:24] + tuple(20 + n for n in range(k, k + 16)) for k in (0, 50)]
    asked = [(*group, k) for group in groups for k in (3, 4)]
    filled, _ = together(pair, asked, cache)
    assert filled.cached == [40] * 4
    assert filled.num_computed == 24 + 2 * 16 + 4
    assert_same(filled, pair, asked)


def test_the_logits_are_those_of_the_model_itself(pair):
    (ids, *_) = prompts()
    plain = pair.target.model(mx.array([ids]))[0, -1]
    assert mx.allclose(prefill_alone(passes_of(pair), ANY, ids).logits[0], plain, atol=1e-4)


def test_rounds_can_go_on_between_passes():
    pair = load_case("qwen3_vanilla").pair
    _, passes = together(pair, prompts(1, shared=60), PrefixCache(0))
    assert passes == 5  # 65 tokens, 16 at a time


@pytest.mark.skipif(not device.is_cpu(), reason="a GPU attends up to each slot's end")
def test_on_a_cpu_a_pass_attends_to_no_room_for_later_ones(monkeypatch):
    pair, ends = load_case("qwen3_vanilla").pair, []
    plain = Passes.run_to

    def seen(self, cache, *given):
        ends.append(cache.layers[0].num_seen)
        return plain(self, cache, *given)

    monkeypatch.setattr(Passes, "run_to", seen)
    (ids,) = prompts(1, shared=60)
    prefill_alone(passes_of(pair), ANY, ids)  # 65 tokens, 16 at a time
    assert ends == [32, 32, 64, 64, 96]  # in blocks of 32
