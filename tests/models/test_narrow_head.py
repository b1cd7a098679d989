"""The logits of some positions of each slot are those of all positions, and cost less."""

import checkpoints as make
import families
import mlx.core as mx
import mlx.nn as nn
import pytest

from dspark_batch.models.narrow_head import NarrowHead
from dspark_batch.models.target import Target, head_of, text_model
from dspark_batch.pair import load_pair

TOKENS = mx.array([[3, 4, 5, 6], [7, 8, 9, 2], [1, 2, 3, 4]])
AT = mx.array([[3, 0], [1, 1], [0, 2]])


def recording(plain):
    """Make a class of heads that note over how many rows they ran."""

    class Recording(plain):
        rows = ()

        def note(self, hidden):
            type(self).rows = (*type(self).rows, hidden.size // hidden.shape[-1])
            return hidden

        def as_linear(self, hidden):
            return super().as_linear(self.note(hidden))

        def __call__(self, given):
            is_head = not hasattr(plain, "as_linear")
            return super().__call__(self.note(given) if is_head else given)

    if not hasattr(plain, "as_linear"):
        del Recording.as_linear
    return Recording


@pytest.mark.parametrize("name", ["qwen3", "llama, tied, with windows", "gemma4_text", "cohere"])
def test_some_positions_of_each_slot_have_the_bits_of_the_whole(tmp_path, name):
    directory = make.write_target(tmp_path / "target", families.RIGHT[name])
    model = load_pair(target=str(directory), dtype="float32").target.model
    head = head_of(text_model(model))
    head.__class__ = recording(type(head))
    target = Target(model)
    whole, _ = target(TOKENS, target.make_cache(3, 64))
    some, _ = target(TOKENS, target.make_cache(3, 64), AT)
    again, _ = target(TOKENS, target.make_cache(3, 64))
    assert mx.array_equal(some, mx.take_along_axis(whole, AT[..., None], axis=1))
    assert mx.array_equal(again, whole)
    assert type(head).rows == (12, 6, 12)


def test_a_head_that_we_do_not_know_computes_all_and_some_are_taken(tmp_path):
    directory = make.write_target(tmp_path / "target", families.RIGHT["gpt2"])
    target = load_pair(target=str(directory), dtype="float32").target
    whole, _ = target(TOKENS, target.make_cache(3, 64))
    some, _ = target(TOKENS, target.make_cache(3, 64), AT)
    assert mx.array_equal(some, mx.take_along_axis(whole, AT[..., None], axis=1))


def test_what_has_another_shape_than_the_step_passes_whole():
    head = nn.Linear(4, 8, bias=False)
    narrow, of_a_drafter = NarrowHead(head), mx.ones((3, 2, 4))
    with narrow.at(AT, (3, 4)):
        assert head(of_a_drafter).shape == (3, 2, 8)
        assert head(mx.ones((3, 4, 4))).shape == (3, 2, 8)
    assert head(mx.ones((3, 4, 4))).shape == (3, 4, 8)
