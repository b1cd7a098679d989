"""Looked-up tokens: what followed the longest place that reads like the end of the text."""

import random

import pytest

from dspark_batch.drafters.lookup import LEAST_MATCH, LONGEST_MATCH, Found, Judged, TextIndex


def by_definition(tokens, count):
    """Look at every earlier place, the latest first; no index."""

    def match(place):
        longest = min(LONGEST_MATCH, place)
        agrees = (tokens[place - n] == tokens[-n] for n in range(1, longest + 1))
        return next((n for n, same in enumerate(agrees) if not same), longest)

    places = range(len(tokens) - 1, 0, -1)
    matches = {place: match(place) for place in places if match(place) >= LEAST_MATCH}
    if not matches:
        return None
    most = max(matches.values())
    best = next(place for place in matches if matches[place] == most)
    said = list(tokens)
    for place in range(best, best + count):
        said.append(said[place])
    return Found(said[len(tokens) :], most)


@pytest.mark.parametrize("seed", range(30))
def test_it_finds_what_a_search_of_the_whole_text_finds(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(3) for _ in range(18)] + [rng.randrange(9) for _ in range(20)]
    index, begin = TextIndex(tokens[:3]), 3
    while begin < len(tokens):
        end = begin + rng.randint(1, 4)
        index.add(tokens[begin:end])
        expected = by_definition(tokens[: len(index)], 5)
        found = index.find(5)
        # It looks at the latest places only: with three tokens there are many.
        assert (found is None) == (expected is None)
        assert found is None or found.match <= expected.match
        if end > 22:
            assert found == expected
        begin = end


def test_the_longest_match_wins_and_the_latest_among_equals():
    text = [1, 2, 3, 4, 50, 2, 3, 4, 60, 2, 3, 4, 70]
    assert TextIndex([*text, 1, 2, 3, 4]).find(1) == Found([50], 4)
    assert TextIndex([*text, 9, 2, 3, 4]).find(1) == Found([70], 3)


def test_two_tokens_are_no_match_and_a_short_text_has_none():
    assert TextIndex([1, 2, 9, 1, 2]).find(3) is None
    assert TextIndex([1, 2]).find(3) is None
    assert TextIndex().find(3) is None


def test_behind_its_end_a_text_is_read_on_as_a_repetition():
    assert TextIndex([7, 8, 7, 8, 7]).find(5) == Found([8, 7, 8, 7, 8], 3)
    assert TextIndex([5, 5, 5, 5]).find(3) == Found([5, 5, 5], 3)


def test_what_came_judges_what_was_found():
    def judged(*came):
        index = TextIndex([1, 2, 3, 4, 5, 6, 1, 2, 3])
        assert index.find(3) == Found([4, 5, 6], 3)
        return index.add(came)

    assert judged(4, 5, 9) == Judged(3, 2, 3)
    assert judged(9) == Judged(3, 0, 1)
    assert judged(4) == Judged(3, 1, 1)  # nothing is known of those behind
    assert judged(4, 5, 6, 7) == Judged(3, 3, 3)


def test_without_a_find_nothing_is_judged():
    index = TextIndex([1, 2, 3, 4, 1, 2, 3])
    assert index.add([4]) is None
    index.find(2)
    index.add([9])
    assert index.add([9]) is None
