"""The law Undo: what was written and did not stay has not happened, bit for bit."""

from functools import partial
from itertools import pairwise

import joined_ops
import mlx.core as mx
import numpy as np
import pytest
from golden_cases import load_case

from dspark_batch import device
from dspark_batch.caches import positions
from dspark_batch.caches.positions import PositionCache
from dspark_batch.caches.slot_cache import Extent, SlotCache
from dspark_batch.engine.engine import Engine
from dspark_batch.models import attention
from dspark_batch.types import Item, Request


def random_keys(seed, slots, tokens, heads=2, dim=4):
    return mx.random.normal((slots, heads, tokens, dim), key=mx.random.key(seed))


def filled(slots, lengths, capacity=16):
    cache = SlotCache([PositionCache], slots)
    cache.reserve(capacity)
    cache.layers[0].update_and_fetch(random_keys(0, slots, 9), random_keys(1, slots, 9))
    cache.keep(mx.array(lengths))
    return cache


def test_a_step_lands_behind_each_slots_own_length():
    cache = filled(3, [2, 9, 5])
    step = random_keys(2, 3, 3)
    keys, _ = cache.layers[0].update_and_fetch(step, step)
    for slot, length in enumerate([2, 9, 5]):
        assert mx.array_equal(keys[slot, :, length : length + 3], step[slot])
        assert mx.array_equal(keys[slot, :, :length], random_keys(0, 3, 9)[slot, :, :length])


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reserve(200),
        lambda cache: cache.resize([0, 2], 2, 32),
        lambda cache: cache.resize([0, 1, 2], 3, 16),
        lambda cache: cache.insert([1], filled(2, [3, 4]), [1], [4]),
        lambda cache: cache.begin_with([[cache.snapshot(n, 0, 2)] for n in (1, 1, 2)]),
        lambda cache: cache.clear([0]),
    ],
)
def test_a_kernel_may_write_into_buffers_whatever_was_done_to_them(change):
    cache = filled(3, [2, 9, 5], capacity=128)
    (layer,) = cache.layers
    part = cache.snapshot(0, 0, 2)
    change(cache)
    found = [layer.keys, layer.values]
    mx.eval(found, part.arrays)
    assert all(memoryview(buffer).c_contiguous for buffer in found)  # else it gets a copy
    spans = [_span(array) for array in (*found, *part.arrays)]
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))  # nobody else has them


def _span(array):
    begin = np.frombuffer(memoryview(array), dtype=np.uint8).ctypes.data
    return begin, begin + array.nbytes


def test_buffers_grow_and_keep_what_they_hold():
    cache = filled(2, [4, 9])
    before = cache.layers[0].keys
    cache.reserve(1000)
    assert cache.capacity >= 1000
    assert cache.layers[0].keys.shape[2] == cache.capacity
    assert mx.array_equal(cache.layers[0].keys[:, :, : before.shape[2]], before)


def test_an_inserted_row_is_the_slot_and_its_neighbours_stay():
    cache, one = filled(3, [4, 9, 6]), filled(1, [7])
    before = cache.layers[0].keys
    cache.insert([1], one, [0], [7])
    assert cache.lengths.tolist() == [4, 7, 6]
    assert mx.array_equal(cache.layers[0].keys[1, :, :7], one.layers[0].keys[0, :, :7])
    assert mx.array_equal(cache.layers[0].keys[0], before[0])
    assert mx.array_equal(cache.layers[0].keys[2], before[2])


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("slots", [[1, 2, 3], [3, 1, 2], [0, 2, 3], [4, 0], [0, 1, 2, 3, 4]])
def test_neighbours_that_are_inserted_together_take_their_own_slots(slots, is_cpu, monkeypatch):
    monkeypatch.setattr(device, "is_cpu", lambda: is_cpu)
    cache, other = filled(5, [4, 9, 6, 2, 3], capacity=500), filled(6, [1, 2, 3, 4, 5, 6])
    chosen = [5, 0, 3, 1, 4][: len(slots)]
    behind = [(0, 0), (0, cache.capacity - other.capacity), (0, 0)]
    wanted = [array.tolist() for array in cache.layers[0].left()]
    for array, others in zip(wanted, other.layers[0].left(), strict=True):
        for slot, which in zip(slots, chosen, strict=True):
            array[slot] = mx.pad(others[which], behind).tolist()
    cache.insert(slots, other, chosen, [1 + which for which in chosen])
    assert [array.tolist() for array in cache.layers[0].left()] == wanted
    assert [cache.lengths[slot].item() for slot in slots] == [1 + which for which in chosen]


def begun_alike(seed, lengths, shared, capacity):
    """Fill slots of bfloat16 whose first 64 positions are the same everywhere."""
    cache = SlotCache([PositionCache], len(lengths))
    cache.reserve(capacity)
    own = random_keys(seed, len(lengths), max(lengths), dim=8).astype(mx.bfloat16)
    first = mx.broadcast_to(
        random_keys(9, 1, 64, dim=8).astype(mx.bfloat16), (len(lengths), 2, 64, 8)
    )
    keys = mx.concatenate([first, own[:, :, 64:]], axis=2)
    cache.layers[0].update_and_fetch(keys, -keys)
    cache.keep(mx.array(lengths))
    cache.share(shared, 0)
    return cache


def told(calls, *given):
    calls.append(given)
    return joined_ops.insert_slots(*given)


@pytest.mark.parametrize("shared", [(0, 0), (64, 64), (64, 0), (0, 64)])
@pytest.mark.parametrize("capacities", [(128, 128), (128, 256), (256, 128)])
def test_a_kernel_that_puts_slots_in_place_leaves_what_mlx_does(shared, capacities, monkeypatch):
    found = []
    for in_place in (False, True):
        lengths = [90, 70, 100], [90, 80, 70]
        of_both = zip((1, 2), lengths, shared, capacities, strict=True)
        cache, other = (begun_alike(*each) for each in of_both)
        with monkeypatch.context() as patch:
            calls = []
            patch.setattr(device, "launches_one_by_one", lambda here=in_place: here)
            patch.setattr(positions, "insert_slots", partial(told, calls))
            cache.insert([2, 0], other, [0, 2], [90, 70])
        assert len(calls) == in_place
        arrays = [cache.lengths, *cache.layers[0].held()]
        found.append([array.astype(mx.float32).tolist() for array in arrays])
    assert found[0] == found[1]


def test_a_window_hides_what_lies_behind_it():
    cache = filled(1, [5])
    mask = cache.layers[0].make_mask(2, window_size=3)
    assert mask[0, 0, 0, :8].tolist() == [False, False, False, True, True, True, False, False]
    assert mask[0, 0, 1, :8].tolist() == [False, False, False, False, True, True, True, False]


@pytest.mark.parametrize("rejected", [1, 3, 8])
def test_tokens_that_did_not_stay_change_no_later_logit(rejected):
    case = load_case("qwen3_vanilla")
    prompt, junk = case["greedy0.prompt_ids"][None], mx.full((1, rejected), 77)
    logits = []
    for steps in ([prompt], [prompt, junk]):
        cache = case.pair.target.make_cache(1, 0)
        cache.reserve(64)
        for tokens in steps:
            case.pair.target(tokens, cache)
            cache.keep(mx.array([0 if tokens is junk else tokens.shape[1]]))
        logits.append(case.pair.target(mx.array([[5, 6]]), cache)[0])
    assert mx.array_equal(logits[0], logits[1])


@pytest.fixture
def attended(monkeypatch):
    """Positions that each call of attention was over."""
    positions, plain = [], attention.ragged_attention

    def spy(queries, keys, *others, **more):
        positions.append(keys.shape[2])
        return plain(queries, keys, *others, **more)

    monkeypatch.setattr(attention, "ragged_attention", spy)
    return positions


on_a_cpu = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="a GPU compiles for each capacity"
)


@on_a_cpu
def test_a_step_attends_to_no_more_than_it_may_see_and_gets_the_same_bits(attended):
    case = load_case("qwen3_vanilla")
    cache = case.pair.target.make_cache(1, 128)
    case.pair.target(case["greedy0.prompt_ids"][None], cache)
    cache.keep(mx.array([20]))
    step, logits = mx.array([[5, 6]]), []
    for seen in (128, 22, 33):
        cache.see(seen)
        logits.append(case.pair.target(step, cache)[0])
    assert sorted(set(attended)) == [32, 64, 128]
    assert mx.array_equal(logits[0], logits[1])
    assert mx.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("change", ["keep", "insert", "clear", "resize", "reserve"])
def test_a_step_sees_the_whole_buffer_when_lengths_have_changed(change):
    cache = filled(2, [4, 9], capacity=128)
    cache.see(10)
    changes = {
        "keep": lambda: cache.keep(mx.array([1, 0])),
        "insert": lambda: cache.insert([1], filled(1, [7]), [0], [7]),
        "clear": lambda: cache.clear([0]),
        "resize": lambda: cache.resize([1], 1, 128),
        "reserve": lambda: cache.reserve(200),
    }
    changes[change]()
    assert cache.layers[0].num_seen == cache.capacity


@on_a_cpu
def test_rounds_behind_a_long_slot_attend_to_what_the_others_need(attended):
    case = load_case("qwen3_vanilla")
    prompt = case.prompt("greedy0")
    long, short = (prompt * 60)[:60], prompt[:4]  # the room for 60 is not given back for 32
    works = [(long, 2), *[(short, 20)] * 4]  # nor is one slot of five
    requests = [
        Request(Item(at, str(at), f"digest-{at}", "test"), ids, most)
        for at, (ids, most) in enumerate(works)
    ]
    completions = list(Engine(case.pair, slots=5, draft_length=2).generate(requests))
    assert [len(each.token_ids) for each in completions] == [2, 20, 20, 20, 20]
    assert max(attended) == 96
    assert attended[-1] == 32


@on_a_cpu
def test_a_target_attends_no_farther_than_its_own_pass_goes(monkeypatch):
    case, seen, see = load_case("qwen3_vanilla"), {}, SlotCache.see

    def noted(self, positions):
        see(self, positions)
        seen.setdefault(id(self), set()).add(self.layers[0].num_seen)

    monkeypatch.setattr(SlotCache, "see", noted)
    ids = (case.prompt("greedy0") * 20)[:20]
    asked = Request(Item(0, "0", "digest-0", "test"), ids, 10)
    engine = Engine(case.pair, slots=1, draft_length=1)
    (completion,) = engine.generate([asked])
    longest = len(ids) + len(completion.token_ids) - 1  # before the last round
    assert longest + 2 <= 32 < longest + case.pair.drafter.block_size
    assert seen[id(engine._slots.cache)] == {32}
    assert max(seen[id(engine._slots.context)]) == 64  # a block of the drafter goes farther


def test_all_layers_count_with_the_same_array():
    extent = Extent(2, 8)
    assert extent.places(3) is extent.places(3)
    assert extent.places(3).tolist() == [0, 1, 2]
    assert extent.places(1).tolist() == [0]
