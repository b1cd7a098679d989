"""Which answers a step learns from: all of them in a pass, the same ones after a stop."""

import numpy as np

from dspark_batch.train.batches import choose, padded, steps_of_a_pass, width_of
from dspark_batch.train.corpus import repeats_itself

LENGTHS = [10, 70, 64, 100, 33, 128, 129, 12, 90, 250]


def test_a_width_is_one_of_few_and_holds_the_length():
    assert [width_of(n) for n in (1, 64, 65, 96, 97, 129, 200)] == [64, 64, 96, 96, 128, 192, 256]


def test_a_pass_reads_every_answer_and_no_batch_is_too_large():
    steps = steps_of_a_pass(LENGTHS, 256)
    chosen = list(choose(LENGTHS, steps, 256, seed=3))
    assert {row for each in chosen for row in each.rows} == set(range(len(LENGTHS)))
    assert all(len(each.rows) * each.width <= 256 for each in chosen)
    assert all(LENGTHS[row] <= each.width for each in chosen for row in each.rows)
    assert [each.step for each in chosen] == list(range(1, steps + 1))


def test_a_training_that_goes_on_reads_what_it_would_have_read():
    whole = list(choose(LENGTHS, 25, 256, seed=3))
    assert list(choose(LENGTHS, 25, 256, seed=3, after=11)) == whole[11:]
    assert list(choose(LENGTHS, 25, 256, seed=4)) != whole


def test_only_the_answer_is_marked_as_one():
    tokens, answers = padded([([1, 2, 3], [4, 5]), ([6], [7, 8, 9])], 6)
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0]]
    expected = [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0]]
    assert np.array(answers).astype(int).tolist() == expected


def test_an_answer_that_ends_in_a_loop_repeats_itself():
    words = list(range(100))
    assert repeats_itself(words + [7, 8, 9] * 30)
    assert repeats_itself([5] * 60)
    assert not repeats_itself(words * 1)
    assert not repeats_itself(words + [7, 8, 9] * 5)
    assert not repeats_itself([7, 8, 9] * 30 + words)
