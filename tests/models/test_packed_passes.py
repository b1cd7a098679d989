"""A packed pass gives each token that it runs over the bits of a whole one, in every family."""

import checkpoints as make
import families
import mlx.core as mx
import numpy as np
import pytest

from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import prefill_alone
from dspark_batch.engine.shapes import Shapes
from dspark_batch.pair import load_pair

WIDTH = 5
OWN = (1, 9, 0, 27, 14)  # tokens of each prompt behind the beginning; the third slot is free
FREE = 2
COUNTS = [(5, 1, 1, 3, 2), (1, 5, 1, 1, 5), (1, 1, 1, 4, 1), (5, 5, 5, 5, 5)]
KINDS = families.often([name for name in families.RIGHT if name not in families.RECURRENT])
# Rows of whole groups of weights that share a scale.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}


def ids(seed, count):
    return [(7919 * seed + 104729 * place) % families.VOCAB for place in range(count)]


PROMPTS = {shared: [ids(0, 32) + ids(n, own) for n, own in enumerate(OWN)] for shared in (0, 32)}


def bits(array):
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()


def filled(passes, shared):
    """A cache whose slots have prompts, but for the free one."""
    cache = passes.make_cache(len(OWN), 100)
    for slot, prompt in enumerate(PROMPTS[shared]):
        if slot != FREE:
            done = prefill_alone(passes, Shapes(), prompt).cache
            cache.insert([slot], done, [0], [len(prompt)])
    cache.share(shared, 0)
    return cache


def stepped(passes, cache, counts, *, packed):
    """What a step gives its first tokens of each slot, and what is remembered of them."""
    tokens = mx.array([ids(50 + slot, WIDTH) for slot in range(len(OWN))])
    before = cache.lengths.tolist()
    logits, features = passes.run(cache, tokens, counts if packed else None)
    stay = [(count + 1) // 2 * (slot != FREE) for slot, count in enumerate(counts)]
    cache.keep(mx.array(stay))
    found = []
    for slot, count in enumerate(counts):
        if slot != FREE:
            end = before[slot] + stay[slot]
            arrays = [logits[slot, :count], *cache.snapshot(slot, 0, end).arrays]
            arrays += [] if features is None else [features[slot, :count]]
            found.append([bits(array) for array in arrays])
    return found


def assert_packed_as_whole(target, shared=0):
    passes = Passes(target, NoDrafter())
    whole, packed = filled(passes, shared), filled(passes, shared)
    assert packed.may_pack
    for counts in COUNTS:
        expected = stepped(passes, whole, counts, packed=False)
        assert stepped(passes, packed, counts, packed=True) == expected
        assert packed.lengths.tolist() == whole.lengths.tolist()


@pytest.mark.parametrize("name", KINDS)
def test_bits_are_those_of_a_whole_pass(tmp_path, name):
    target = make.write_target(tmp_path / "target", families.RIGHT[name])
    drafter = make.deepspec(make.qwen3(families.LAYERS), layers=1, taps=(-1, 2))
    drafter = make.write_drafter(tmp_path / "drafter", drafter)
    pair = load_pair(target=str(target), drafter=str(drafter), dtype="float32")
    for shared in PROMPTS:
        assert_packed_as_whole(pair.target, shared)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_so_they_are_of_quantised_weights(tmp_path, name):
    target = make.write_target(tmp_path / "target", families.RIGHT[name] | WIDE)
    target = load_pair(target=str(target), dtype="float32", target_bits=4).target
    assert any(hasattr(each, "bits") for each in target.model.layers[1].mlp.modules())
    assert_packed_as_whole(target)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gpt2"])
def test_so_they_are_of_short_numbers(tmp_path, name):
    target = make.write_target(tmp_path / "target", families.RIGHT[name])
    assert_packed_as_whole(load_pair(target=str(target), dtype="bfloat16").target)


def test_a_packed_pass_runs_over_its_tokens_alone(tmp_path):
    target = make.write_target(tmp_path / "target", families.RIGHT["llama"])
    target = load_pair(target=str(target), dtype="float32").target
    passes, seen = Passes(target, NoDrafter()), []
    layer = target.model.layers[1].mlp
    plain = type(layer)

    class Watched(plain):
        def __call__(self, hidden):
            seen.append(hidden.shape[:2])
            return super().__call__(hidden)

    layer.__class__ = Watched
    cache = filled(passes, 0)
    seen.clear()
    for counts in COUNTS:
        passes.run(cache, mx.zeros((len(OWN), WIDTH), mx.int32), counts)
    assert seen == [(sum(counts), 1) for counts in COUNTS]


def test_behind_a_packed_pass_that_failed_others_are_whole(tmp_path):
    target = make.write_target(tmp_path / "target", families.RIGHT["llama"])
    passes = Passes(load_pair(target=str(target), dtype="float32").target, NoDrafter())
    cache, tokens = filled(passes, 0), mx.zeros((len(OWN), WIDTH), mx.int32)
    with pytest.raises(RuntimeError), cache.packed(COUNTS[0], WIDTH):
        raise RuntimeError
    known = filled(passes, 0)
    assert bits(passes.run(cache, tokens)[0]) == bits(passes.run(known, tokens)[0])
