"""States of recurrent layers: what did not stay has not happened, bit for bit."""

import functools
import gc
import random
import weakref
from types import SimpleNamespace

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.caches.states import StateCache
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine import passes
from dspark_batch.engine.passes import Passes

TOKENS = 48  # of a content
VOCAB = 128


@pytest.fixture(params=["qwen35_dflash", "qwen35_moe_dflash"])
def target(request):
    return load_case(request.param).pair.target


def ids(content):
    return [(31 * content + 7 * place + place * place) % VOCAB for place in range(TOKENS)]


def step(target, cache, rows, counts, *, expects=False):
    """Run a step, keep some of it; return its logits."""
    counts = mx.array(counts)
    if expects:
        cache.expect(counts)
    logits, _ = Passes(target, NoDrafter()).run(cache, mx.array(rows))
    cache.keep(counts)
    mx.eval(logits, cache.arrays())
    return logits


@functools.cache
def beginnings(target, content):
    """Make what tells what is remembered of the first tokens of a content that came one by one."""
    cache, parts = target.make_cache(1, 64), []

    def remembered(count):
        while len(parts) < count:
            step(target, cache, [[ids(content)[len(parts)]]], [1])
            parts.append(cache.snapshot(0, 0, len(parts) + 1))
            mx.eval(parts[-1].arrays)
        return parts[count - 1]

    return remembered


def alone(target, content, count):
    """What is remembered of the first tokens of a content that came one by one."""
    return beginnings(target, content)(count)


def is_same(part, other):
    pairs = zip(part.arrays, other.arrays, strict=True)
    return all(mx.array_equal(a, b) for a, b in pairs)


def ragged(target, seed, width, *, expects=False):
    """Three contents in steps of a width, of which any number of tokens stays."""
    rng, cache, done = random.Random(seed), target.make_cache(3, 64), [0, 0, 0]
    while min(done) < 12:
        counts = [rng.randint(0, width) for _ in done]
        pairs = list(enumerate(zip(done, counts, strict=True)))
        rows = [ids(c)[d : d + n] + [rng.randrange(VOCAB)] * (width - n) for c, (d, n) in pairs]
        step(target, cache, rows, counts, expects=expects)
        done = [d + n for _, (d, n) in pairs]
        if max(done) + width > TOKENS:
            break
    return cache, done


@pytest.mark.parametrize("expects", [False, True], ids=["told behind", "told before"])
@pytest.mark.parametrize("width", [1, 5, 16])
def test_any_count_leaves_what_its_tokens_alone_leave(target, width, expects):
    cache, done = ragged(target, width, width, expects=expects)
    for content, length in enumerate(done):
        found = cache.snapshot(content, 0, length)
        assert is_same(found, alone(target, content, length)), (content, length)


def test_a_step_that_is_taken_back_whole_changes_nothing(target):
    cache, done = ragged(target, 7, 4)
    before = [cache.snapshot(slot, 0, length) for slot, length in enumerate(done)]
    step(target, cache, [[5, 6, 7], [8, 9, 10], [1, 2, 3]], [0, 0, 0])
    after = [cache.snapshot(slot, 0, length) for slot, length in enumerate(done)]
    assert all(map(is_same, before, after))


def test_a_slot_that_was_cleared_remembers_nothing(target):
    cache, _ = ragged(target, 3, 4)
    cache.clear([1])
    step(target, cache, [[0] * 6, ids(9)[:6], [0] * 6], [0, 6, 0])
    assert is_same(cache.snapshot(1, 0, 6), alone(target, 9, 6))


def test_slots_are_inserted_moved_and_new_ones_are_empty(target):
    cache, done = ragged(target, 4, 4)
    other = target.make_cache(2, 64)
    step(target, other, [[0] * 7, ids(6)[:7]], [0, 7])
    cache.insert([0], other, [1], [7])
    cache.resize([2, 0], 4, 64)
    step(target, cache, [[0] * 3] * 2 + [ids(8)[:3]] + [[0] * 3], [0, 0, 3, 0])
    assert is_same(cache.snapshot(0, 0, done[2]), alone(target, 2, done[2]))
    assert is_same(cache.snapshot(1, 0, 7), alone(target, 6, 7))
    assert is_same(cache.snapshot(2, 0, 3), alone(target, 8, 3))


def test_a_beginning_goes_on_in_several_slots(target):
    beginning, behind = alone(target, 1, 9), ids(1)[9:14]
    cache = target.make_cache(3, 64)
    cache.begin_with([[beginning], [], [beginning]])
    assert cache.lengths.tolist() == [9, 0, 9]
    step(target, cache, [behind, ids(4)[:5], behind], [5, 5, 2])
    assert is_same(cache.snapshot(0, 0, 14), alone(target, 1, 14))
    assert is_same(cache.snapshot(1, 0, 5), alone(target, 4, 5))
    assert is_same(cache.snapshot(2, 0, 11), alone(target, 1, 11))


def test_what_is_no_number_stays_with_its_slot(target):
    cache, done = ragged(target, 5, 4)
    for layer in cache.layers:
        if isinstance(layer, StateCache):
            for array in layer.held():
                array[1] = mx.nan
    step(target, cache, [ids(0)[done[0] :][:1], [3], ids(2)[done[2] :][:1]], [1, 0, 1])
    for slot in (0, 2):
        known = alone(target, slot, done[slot] + 1)
        assert is_same(cache.snapshot(slot, 0, done[slot] + 1), known)


def test_the_bytes_of_a_slot_are_those_of_its_arrays(target):
    cache = target.make_cache(3, 64)
    step(target, cache, [[1], [2], [3]], [1, 1, 1])
    states = [layer for layer in cache.layers if isinstance(layer, StateCache)]
    assert cache.bytes_per_slot == sum(a.nbytes for s in states for a in s.held()) // 3
    others = [layer for layer in cache.layers if layer not in states]
    total = sum(array.nbytes for layer in others for array in layer.held())
    assert cache.bytes_per_position == total // (3 * cache.capacity)


def test_a_compiled_keep_leaves_the_same(target, monkeypatch):
    monkeypatch.setattr(passes, "device", SimpleNamespace(is_cpu=lambda: False))
    mx.disable_compile()
    compiled = Passes(target, NoDrafter())
    caches = target.make_cache(3, 64), target.make_cache(3, 64)
    for number, counts in enumerate([[4, 4, 4], [0, 2, 4], [1, 0, 3]]):
        rows = mx.array([ids(content)[4 * number : 4 * number + 4] for content in range(3)])
        for cache in caches:
            if number == 2:
                cache.expect(mx.array(counts))
            target(rows, cache)
        caches[0].keep(mx.array(counts))
        compiled.keep(caches[1], mx.array(counts))
        for mine, other in zip(*(cache.arrays() for cache in caches), strict=True):
            assert mx.array_equal(mine, other)
    mx.enable_compile()
    layers = [layer for layer in caches[1].layers if isinstance(layer, StateCache)]
    assert not any(layer.left() for layer in layers)  # no step is behind them


def test_a_step_that_is_over_holds_no_states(target):
    cache = target.make_cache(2, 64)
    states = [weakref.ref(layer) for layer in cache.layers if isinstance(layer, StateCache)]
    step(target, cache, [[1, 2], [3, 4]], [1, 2])
    del cache
    gc.collect()
    assert states
    assert not any(state() for state in states)


def test_states_stay_in_float32(target):
    cache = target.make_cache(1, 64)
    step(target, cache, [[1, 2]], [1])
    kept = [layer.held()[1].dtype for layer in cache.layers if isinstance(layer, StateCache)]
    assert set(kept) == {mx.float32}


def test_a_cache_without_layers_has_lengths():
    cache = SlotCache([], 2, 8)
    cache.keep(mx.array([1, 3]))
    assert cache.lengths.tolist() == [1, 3]
