"""The tree of shared beginnings: finds what was stored, of nobody else, and forgets the oldest."""

import random

import mlx.core as mx
import pytest

from dspark_batch.caches.positions import KeysValues
from dspark_batch.caches.prefix_cache import CHUNK, PrefixCache, chunks_of
from dspark_batch.caches.slot_cache import Part
from dspark_batch.caches.states import State


def part(ids, start=0):
    """Parts whose content is the tokens themselves, so that a wrong one shows."""
    tokens = mx.array(ids[start:], dtype=mx.float32)[None, :, None]
    return (Part(len(ids) - start, (KeysValues(tokens, tokens),)),)


def content(prefix):
    return [int(x) for (part,) in prefix.parts for x in part.arrays[0][0, :, 0].tolist()]


def stored(*beginnings, most=1000):
    cache = PrefixCache(most)
    for ids in beginnings:
        cache.store(ids, part(ids, cache.find(ids).length))
    return cache


def ids_of(*chunks):
    return tuple(c * 100 + k for c in chunks for k in range(CHUNK))


def test_finds_the_longest_stored_beginning_in_whole_chunks():
    cache = stored(ids_of(1, 2, 3))
    for prompt, length in (
        (ids_of(1, 2, 3, 4), 3 * CHUNK),
        (ids_of(1, 2, 9), 2 * CHUNK),
        (ids_of(1, 2)[:-1], CHUNK),
        (ids_of(9, 2, 3), 0),
        ((), 0),
    ):
        found = cache.find(prompt)
        assert (found.length, content(found)) == (length, list(prompt[:length]))


def test_what_goes_on_otherwise_shares_the_beginning():
    cache = stored(ids_of(1, 2, 3), ids_of(1, 2, 4, 5), ids_of(1, 6))
    for prompt in (ids_of(1, 2, 3), ids_of(1, 2, 4, 5), ids_of(1, 6)):
        assert content(cache.find(prompt)) == list(prompt)
    assert content(cache.find(ids_of(1, 2, 4, 7))) == list(ids_of(1, 2, 4))


def test_a_beginning_is_shared_once_two_prompts_have_it_and_never_whole():
    cache, a, b = PrefixCache(1000), ids_of(1, 2, 3), ids_of(1, 2, 4)
    cache.expect(chunks_of(a))
    assert cache.num_shared(chunks_of(a)) == 0
    cache.expect(chunks_of(b))
    assert cache.num_shared(chunks_of(a)) == 2
    cache.expect(chunks_of(a))
    assert cache.num_shared(chunks_of(a)) == 2  # its last chunk has the last token


def test_what_was_used_longest_ago_goes_first_and_a_parent_stays_with_its_child():
    cache = stored(ids_of(1, 2), ids_of(3, 4), ids_of(1, 2, 5), most=5 * CHUNK)
    cache.find(ids_of(1, 2, 5))
    cache.store(ids_of(6), part(ids_of(6)))
    assert cache.find(ids_of(3, 4)).length == 0
    assert cache.find(ids_of(1, 2, 5)).length == 3 * CHUNK
    assert cache.find(ids_of(6)).length == CHUNK


def test_a_cache_without_room_shares_and_keeps_nothing():
    cache = PrefixCache(0)
    for _ in range(2):
        cache.expect(chunks_of(ids_of(1, 2)))
    assert cache.num_shared(chunks_of(ids_of(1, 2))) == 0


def stateful(*beginnings, most=1000, per_end=0):
    """A cache whose parts have a state at their end: all tokens up to it."""
    cache = PrefixCache(most, per_end)
    for ids in beginnings:
        (known,) = part(ids, cache.num_stored(ids))
        cache.store(ids, (Part(known.length, (*known.layers, State([mx.array(ids)]))),))
    return cache


def end_of(prefix):
    return prefix.parts[-1][0].layers[1].arrays[0].tolist()


def test_with_states_a_beginning_is_found_up_to_where_one_is_known():
    cache = stateful(ids_of(1, 2, 3), ids_of(1, 2, 3, 4, 5))
    for prompt, length in (
        (ids_of(1, 2, 3, 4, 5, 6), 5 * CHUNK),
        (ids_of(1, 2, 3, 4, 9), 3 * CHUNK),
        (ids_of(1, 2, 9), 0),
    ):
        found = cache.find(prompt)
        assert (found.length, content(found)) == (length, list(prompt[:length]))
        assert length == 0 or end_of(found) == list(prompt[:length])
    assert cache.num_stored(ids_of(1, 2, 9)) == 2 * CHUNK


def test_an_end_inside_what_is_stored_is_kept_beside_it():
    cache = stateful(ids_of(1, 2, 3, 4), ids_of(1, 2), ids_of(1, 2, 7))
    for prompt in (ids_of(1, 2), ids_of(1, 2, 3, 4), ids_of(1, 2, 7)):
        found = cache.find(prompt)
        assert content(found) == list(prompt)
        assert end_of(found) == list(prompt)
    found = cache.find(ids_of(1, 2, 3, 9))
    assert (content(found), end_of(found)) == (list(ids_of(1, 2)), list(ids_of(1, 2)))


def test_an_end_takes_room():
    cache = stateful(ids_of(1, 2), ids_of(3, 4), ids_of(5, 6), most=6 * CHUNK, per_end=CHUNK)
    assert cache.find(ids_of(1, 2)).length == 0
    assert cache.find(ids_of(3, 4)).length == cache.find(ids_of(5, 6)).length == 2 * CHUNK
    assert PrefixCache(CHUNK, 2 * CHUNK).num_shared(chunks_of(ids_of(1, 2))) == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_agree_with_a_plain_list(seed):
    rng = random.Random(seed)
    cache, known = PrefixCache(10**6), []
    for _ in range(40):
        ids = ids_of(*(rng.randrange(3) for _ in range(rng.randrange(1, 6))))
        found = cache.find(ids)
        common = [
            next(
                (n for n in range(len(ids) // CHUNK, 0, -1) if k[: n * CHUNK] == ids[: n * CHUNK]),
                0,
            )
            for k in known
        ]
        assert found.length == CHUNK * max(common, default=0)
        assert content(found) == list(ids[: found.length])
        if found.length < len(ids):
            cache.store(ids, part(ids, found.length))
            known.append(ids)
