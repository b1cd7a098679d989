import mlx.core as mx

from dspark_batch.numerics.masks import ragged_block, ragged_causal, windowed_block


def test_each_slot_sees_its_own_past_and_itself():
    mask = ragged_causal(mx.array([0, 2]), width=2, capacity=5)
    assert mask.shape == (2, 1, 2, 5)
    assert mask[0, 0].astype(mx.int32).tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert mask[1, 0].astype(mx.int32).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_a_block_sees_all_context_and_all_of_itself():
    mask = ragged_block(mx.array([0, 2]), width=3, capacity=6)
    assert mask[:, 0, 0].astype(mx.int32).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]


def test_without_a_window_a_block_mask_is_the_plain_one():
    where = (mx.array([0, 2, 5]), 3, 9)
    mask = windowed_block(*where, window=None, from_anchor=False, causal=False)
    assert mx.array_equal(mask, ragged_block(*where))


def test_a_window_counts_back_from_each_slot_or_from_the_anchor():
    where = (mx.array([4]), 2, 7)
    slot = windowed_block(*where, window=3, from_anchor=False, causal=True)
    anchor = windowed_block(*where, window=3, from_anchor=True, causal=False)
    assert slot[0, 0].astype(mx.int32).tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0]]
    assert anchor[0, 0].astype(mx.int32).tolist() == [[0, 1, 1, 1, 1, 1, 0]]  # for both slots
