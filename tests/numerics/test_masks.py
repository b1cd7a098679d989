import mlx.core as mx

from dspark_batch.numerics.masks import ragged_block, ragged_causal


def test_each_slot_sees_its_own_past_and_itself():
    mask = ragged_causal(mx.array([0, 2]), width=2, capacity=5)
    assert mask.shape == (2, 1, 2, 5)
    assert mask[0, 0].astype(mx.int32).tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert mask[1, 0].astype(mx.int32).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_a_block_sees_all_context_and_all_of_itself():
    mask = ragged_block(mx.array([0, 2]), width=3, capacity=6)
    assert mask[:, 0, 0].astype(mx.int32).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
