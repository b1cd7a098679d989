"""What is committed is what plain decoding would have said."""

import pytest

from dspark_batch.answers.sequence import Sequence
from dspark_batch.types import Item, Request

STOP = 99


def sequence(max_tokens=10, first=1):
    started = Sequence(Request(Item(0, "0", "d", "t:1"), (5, 6), max_tokens), frozenset([STOP]))
    started.begin(first)
    return started


def test_the_bonus_follows_the_accepted_drafts():
    answer = sequence()
    assert answer.advance([2, 3], 4, num_drafted=7) == 3
    assert answer.token_ids == [1, 2, 3, 4]
    assert answer.finish_reason is None
    assert answer.cached_len == 2 + 4 - 1


def test_a_stop_token_among_the_accepted_drafts_ends_the_answer_there():
    answer = sequence()
    assert answer.advance([2, STOP, 3], 4, num_drafted=7) == 2
    assert answer.token_ids == [1, 2, STOP]
    assert answer.finish_reason == "stop"
    assert answer.completion("").num_accepted == (2,)
    assert answer.spoken_ids() == [1, 2]


def test_a_stop_token_as_bonus_ends_the_answer():
    answer = sequence()
    answer.advance([2], STOP, num_drafted=7)
    assert (answer.token_ids, answer.finish_reason) == ([1, 2, STOP], "stop")
    assert answer.completion("").num_accepted == (1,)


def test_the_limit_cuts_inside_the_block():
    answer = sequence(max_tokens=3)
    assert answer.advance([2, 3, 4], 5, num_drafted=7) == 2
    assert (answer.token_ids, answer.finish_reason) == ([1, 2, 3], "length")
    assert answer.spoken_ids() == [1, 2, 3]


def test_a_stop_token_on_the_limit_is_a_stop():
    answer = sequence(max_tokens=3)
    answer.advance([2, STOP], 4, num_drafted=7)
    assert answer.finish_reason == "stop"


def test_a_stop_token_behind_the_limit_is_not_seen():
    answer = sequence(max_tokens=3)
    answer.advance([2, 3, STOP], 4, num_drafted=7)
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(("first", "reason"), [(STOP, "stop"), (7, "length")])
def test_a_single_token_can_be_the_whole_answer(first, reason):
    answer = sequence(max_tokens=1, first=first)
    assert answer.finish_reason == reason
    assert answer.completion("").accept_lengths == ()


def test_an_unfinished_answer_is_no_completion():
    with pytest.raises(ValueError, match="not finished"):
        sequence().completion("")
