import mlx.core as mx

from dspark_batch.numerics.acceptance import accept_greedy, accept_with_bonus
from dspark_batch.numerics.confidence import threshold_lengths


def test_stops_at_the_first_disagreement():
    accepted = accept_greedy(mx.array([[7, 8, 9]]), mx.array([[7, 0, 9, 5]]), mx.array([3]))
    assert accepted.tolist() == [1]  # 9 agrees again, but nothing after a miss may count


def test_drafts_that_were_not_verified_do_not_count():
    drafts, choice = mx.array([[7, 8, 9]] * 4), mx.array([[7, 8, 9, 5]] * 4)
    assert accept_greedy(drafts, choice, mx.array([0, 1, 2, 3])).tolist() == [0, 1, 2, 3]


def test_the_bonus_is_the_targets_choice_behind_the_accepted_drafts():
    drafts, choice = mx.array([[7, 8, 9]] * 3), mx.array([[7, 8, 9, 5], [7, 0, 9, 5], [4, 8, 9, 5]])
    accepted, bonus = accept_with_bonus(drafts, choice, mx.array([3, 3, 3]))
    assert (accepted.tolist(), bonus.tolist()) == ([3, 1, 0], [5, 0, 4])


def test_no_drafts_are_no_accepted_drafts():
    drafts = mx.zeros((2, 0), dtype=mx.int32)
    assert accept_greedy(drafts, mx.array([[5], [6]]), mx.array([0, 0])).tolist() == [0, 0]


def test_a_block_is_cut_before_its_first_doubtful_draft():
    logits = mx.array([[2.0, -1.0, 3.0], [-0.1, 9.0, 9.0], [0.0, 0.0, 0.0]])
    assert threshold_lengths(logits, 0.5).tolist() == [1, 0, 3]  # sigmoid(0) is not below 0.5


def test_threshold_zero_never_cuts():
    assert threshold_lengths(mx.array([[-90.0, -90.0]]), 0.0).tolist() == [2]
