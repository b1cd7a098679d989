"""What all slots begin with is kept once, and nobody's tokens are others for it."""

import random

import mlx.core as mx
import pytest
from golden_cases import load_case
from grids import grid

from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.engine import shapes
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import prefill_alone
from dspark_batch.engine.shapes import Shapes, common_len
from dspark_batch.engine.slots import Slots
from dspark_batch.types import Item, Request, Sampling

BLOCK = 32  # of these tests
PAIRS = ["qwen3_vanilla", "gemma4_vanilla", "qwen35_dflash"]


@pytest.fixture(params=PAIRS)
def pair(request):
    return load_case(request.param).pair


def ids(seed, count):
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 120) for _ in range(count))


def asked(systems, *, seed, items=14, temperature=0.0):
    """Make requests of which each has one of the systems, and tokens of its own."""
    rng = random.Random(seed)
    for index in range(items):
        system = systems[rng.randrange(len(systems))]
        own = ids(100 + index, rng.randint(1, 40))
        item = Item(index, str(index), f"{index:032x}", f"test:{index}")
        sampling = Sampling(temperature=temperature)
        yield Request(item, (*system, *own), rng.randint(1, 20), sampling)


def answers(pair, requests, **settings):
    outcomes = Engine(pair, **{"slots": 6} | settings).generate(requests)
    return [outcome.token_ids for outcome in sorted(outcomes, key=lambda o: o.item.index)]


@pytest.fixture
def shared(monkeypatch):
    """List what is shared from which moment on: by slots and positions."""
    changes = []
    share = SlotCache.share

    def watched(cache, positions, slot):
        if positions != cache.shared:
            changes.append((cache.lengths.shape[0], positions))
        share(cache, positions, slot)

    monkeypatch.setattr(SlotCache, "share", watched)
    return changes


SYSTEMS = {
    "one": [ids(1, 100)],
    "one, or none": [ids(1, 100), ()],
    "two": [ids(1, 100), ids(2, 70)],
    "two that begin alike": [ids(1, 100), ids(1, 40) + ids(3, 50)],
}


@pytest.mark.parametrize(
    ("pair", "systems", "temperature"), grid(PAIRS, [*SYSTEMS], [0.0, 1.0]), indirect=["pair"]
)
def test_a_job_has_the_same_answers(pair, systems, temperature, shared, monkeypatch):
    work = list(asked(SYSTEMS[systems], seed=5, temperature=temperature))
    found = answers(pair, work)
    assert any(positions for _, positions in shared) or systems == "one, or none"
    monkeypatch.setattr(Shapes, "share", lambda self, slots: False)
    shared.clear()
    assert found == answers(pair, work)
    assert not shared


OWN = (5, 33, 12)  # tokens behind the beginning
SYSTEM = ids(1, 100)
PROMPTS = [SYSTEM + ids(20 + n, own) for n, own in enumerate(OWN)]


def seated(pair, prompts=PROMPTS, *, shared=0, slots=5, room=200):
    """Put prompts into the first of some slots, which share so many positions."""
    passes = Passes(pair.target, pair.drafter)
    cache = passes.make_cache(slots, room)
    for slot, prompt in enumerate(prompts):
        cache.insert([slot], prefill_alone(passes, Shapes(), prompt).cache, [0], [len(prompt)])
    cache.share(shared, 0)
    return cache


def remembered(cache, prompts=PROMPTS):
    """Say what the first slots hold, and what a step gives them."""
    parts = [cache.snapshot(slot, 0, len(ids)).arrays for slot, ids in enumerate(prompts)]
    return [array.tolist() for arrays in parts for array in arrays if array.ndim == 3]


def stepped(pair, cache):
    """Run a step of three tokens in all slots, of which two stay; return logits and what stays."""
    slots = cache.lengths.shape[0]
    tokens = mx.array([[7 + slot, 8, 9] for slot in range(slots)])
    logits, _ = Passes(pair.target, pair.drafter).run(cache, tokens)
    cache.keep(mx.where(mx.arange(slots) < len(OWN), 2, 0))
    longer = [(*prompt, 0, 0) for prompt in PROMPTS]
    return logits[: len(OWN)].tolist(), remembered(cache, longer)


@pytest.mark.parametrize(
    ("pair", "way"),
    grid(PAIRS, [[96], [32, 96, 64], [96, 0], [64, 0, 96]]),
    indirect=["pair"],
)
def test_slots_remember_the_same_whatever_they_share(pair, way):
    known, cache = seated(pair), seated(pair)
    for positions in way:
        cache.share(positions, 1)
        assert cache.shared == positions
        assert cache.lengths.tolist() == [*map(len, PROMPTS), positions, positions]
        assert remembered(cache) == remembered(known)
    for _ in range(2):
        assert stepped(pair, cache) == stepped(pair, known)


def test_a_step_behind_a_beginning_lands_where_it_would_without(pair):
    known, cache = seated(pair, room=120), seated(pair, room=120, shared=96)
    for room in (0, 300, 1000):
        known.reserve(room)
        cache.reserve(room)
        assert cache.capacity == known.capacity
        assert stepped(pair, cache) == stepped(pair, known)
        known.lengths = cache.lengths = mx.array([*map(len, PROMPTS), 96, 96])


def test_a_beginning_lies_in_memory_once():
    pair = load_case("qwen3_vanilla").pair
    cache = seated(pair, slots=len(PROMPTS), room=160)
    before = sum(array.nbytes for array in cache.arrays())
    cache.share(96, 0)
    after = sum(array.nbytes for array in cache.arrays())
    assert before - after == 2 * 96 * cache.bytes_per_position


def test_attention_gets_the_parts_of_what_was_fetched_and_of_nothing_else():
    cache = seated(load_case("qwen3_vanilla").pair, slots=len(PROMPTS), room=160, shared=96)
    layer, own = cache.layers[0], cache.capacity - 96
    step = mx.ones((len(PROMPTS), *layer.keys.shape[1:2], 1, layer.keys.shape[3]))
    keys, values = layer.update_and_fetch(step, step)
    beginning, *parts = layer.split(keys, values)
    assert beginning.keys.shape[1] == 96
    assert [part.shape[2] for part in parts] == [own, own]
    for others in ((keys, values * 2), (keys * 2, values), (layer.keys, values)):
        assert layer.split(*others) == (None, *others)


def test_it_stays_while_somebody_is_there_and_goes_with_the_last(pair):
    cache, known = seated(pair, shared=96), seated(pair)
    cache.clear([0, 2])
    assert cache.lengths.tolist() == [96, len(PROMPTS[1]), 96, 96, 96]
    cache.resize([1], 2, 200)
    known.resize([1], 2, 200)
    assert cache.shared == 96
    assert remembered(cache, PROMPTS[1:2]) == remembered(known, PROMPTS[1:2])
    cache.resize([], 2, 200)
    assert cache.shared == 0
    assert cache.lengths.tolist() == [0, 0]
    other = [ids(9, 110)]
    alone = seated(pair, other, slots=1, shared=96)
    cache.share(64, 0)
    cache.insert([1], alone, [0], [110])
    assert remembered(alone, other) == [
        array.tolist() for array in cache.snapshot(1, 0, 110).arrays if array.ndim == 3
    ]


def test_who_begins_otherwise_ends_it_for_all(shared, monkeypatch):
    """And it is kept once again when that one is gone."""
    pair = load_case("qwen3_vanilla").pair

    def answered():
        engine, outcomes = Engine(pair, slots=6, draft_length=0), []
        for request in asked([SYSTEM], seed=1, items=24):
            engine.add(request)
        for count in range(1000):
            if count == 3:
                other = Item(99, "99", "9" * 32, "test:99")
                engine.add(Request(other, ids(2, 70), 4), urgent=True)
            outcomes += engine.step()
        return {outcome.item.index: outcome.token_ids for outcome in outcomes}

    found = answered()
    assert len(found) == 25
    assert [positions for slots, positions in shared if slots == 6][::2] == [96, 0, 96]
    monkeypatch.setattr(Shapes, "share", lambda self, slots: False)
    assert found == answered()


def test_who_comes_when_all_are_gone_has_a_beginning_of_its_own(shared, monkeypatch):
    pair = load_case("qwen3_vanilla").pair

    def answered():
        engine, found = Engine(pair, slots=4, draft_length=0), []
        for seed in (1, 2):  # all of these end together
            prompts = [ids(seed, 100) + ids(10 + n, 5) for n in range(4)]
            items = [Item(n, str(n), f"{n:032x}", "test") for n in range(4)]
            kept = Sampling(ignore_eos=True)
            work = [Request(i, p, 6, kept) for i, p in zip(items, prompts, strict=True)]
            found += [outcome.token_ids for outcome in engine.generate(work)]
        return found

    found = answered()
    assert [positions for _, positions in shared][::2] == [96, 96]
    monkeypatch.setattr(Shapes, "share", lambda self, slots: False)
    assert found == answered()


class FailsAt:
    """A drafter that cannot take in the features of one call."""

    def __init__(self, whole, call):
        self._whole, self._left = whole, call

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def extend(self, context, features):
        self._left -= 1
        if self._left == 0:
            raise ValueError("features of no use")
        self._whole.extend(context, features)


def test_contexts_share_nothing_while_one_is_there_whose_drafter_rested(monkeypatch):
    """Its slot holds what a former owner left."""
    pair, shares = load_case("qwen3_vanilla").pair, []
    plain, enter = Engine(pair, slots=6), Slots.enter

    def entered(slots, newcomers, *rest):
        newcomers[0].has_context = False
        monkeypatch.setattr(slots.context, "share", lambda count, owner: shares.append(count))
        enter(slots, newcomers, *rest)
        assert slots.cache.shared > 0

    monkeypatch.setattr(Slots, "enter", entered)
    next(iter(plain.generate(asked(SYSTEMS["one"], seed=5, items=6))))
    assert set(shares) == {0}


def test_contexts_share_nothing_while_one_is_there_that_the_drafter_could_not_make():
    pair = load_case("qwen3_vanilla").pair
    engine = Engine(pair._replace(drafter=FailsAt(pair.drafter, 3)), slots=6)
    for request in asked([SYSTEM], seed=1, items=20):
        engine.add(request)
    seen = set()
    while not engine.is_idle:
        engine.step()
        slots = engine._slots
        is_known = all(sequence.fallback is None for sequence in slots.active)
        if len(slots.active) >= 4:
            seen.add((is_known, slots.cache.shared, slots.context.shared))
    assert seen >= {(True, 96, 96), (False, 96, 0)}


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([], 0),
        ([ids(1, 32)], 0),  # a token must be left
        ([ids(1, 33)], 32),
        ([ids(1, 100), ids(1, 100)], 96),
        ([ids(1, 70), ids(1, 100), ids(1, 33)], 32),
        ([ids(1, 64) + ids(2, 9), ids(1, 100)], 64),
        ([(*ids(1, 63), 1, 1), ids(1, 100)], 32),
        ([ids(1, 100), ids(2, 100)], 0),
    ],
)
def test_what_prompts_have_in_common_is_whole_blocks(prompts, length):
    assert common_len(prompts) == length


def test_few_slots_and_targets_with_one_shape_share_nothing(monkeypatch):
    assert [Shapes().share(slots) for slots in (1, 3, 4, 64)] == [False, False, True, True]
    assert not Shapes(fixed=(16, 8)).share(16)
    monkeypatch.setattr(shapes, "has_beginnings", lambda: False)
    assert not Shapes().share(64)
