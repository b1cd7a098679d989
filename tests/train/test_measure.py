"""Rounds are counted as decoding counts them."""

import numpy as np

from dspark_batch.train.measure import Tally, walk


def test_a_walk_counts_rounds_as_decoding_does():
    answer = [10, 11, 12, 13, 14, 2]
    drafts = np.zeros((6, 3), np.int32)
    drafts[0] = (11, 12, 99)  # two accepted, the bonus is 13
    drafts[3] = (14, 2, 7)  # the answer ends inside the drafts: no bonus
    tally = Tally()
    walk(tally, answer, drafts)
    assert (tally.rounds, tally.tokens) == (2, 5)
    assert tally.report()["accept_length"] == 2.5
    assert tally.report()["accept_rate"] == [1.0, 1.0, 0.0]
