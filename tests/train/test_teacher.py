"""A frozen target of any family: its logits where asked, and what a drafter copies of it."""

import checkpoints
import families
import mlx.core as mx
import pytest

from dspark_batch.pair import load_pair
from dspark_batch.train.teacher import TappedTarget, ends_for_drafter

TOKENS = mx.array([[5, 9, 33, 2, 7, 11], [8, 8, 40, 3, 1, 0]])
POSITIONS = mx.array([[0, 3], [5, 2]])
SCALES = {
    "granite": 0.5,
    "granitemoe": 0.5,
    "granitemoehybrid": 0.5,
    "cohere": 0.0625,
    "cohere2": 0.0625,
}
NAMES = families.often(name for name in families.RIGHT if name not in families.UNTAPPED)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_of_a_family_are_its_own_and_only_where_asked(tmp_path, name):
    directory = checkpoints.write_target(tmp_path / "t", families.RIGHT[name])
    pair = load_pair(target=str(directory), dtype="float32")
    model, facts = pair.target.model, pair.target.facts
    whole = model(TOKENS)
    target = TappedTarget(model, (0, 2))
    features, logits = target.teach(TOKENS, POSITIONS)
    expected = mx.take_along_axis(whole, POSITIONS[..., None], axis=1)
    assert logits.shape == (2, 2, facts.vocab_size)
    assert mx.abs(logits - expected).max().item() < 1e-4
    assert features.shape == (2, 6, 2 * facts.hidden_size)
    scale = target.logit_scale(facts.logit_softcap)
    assert scale == pytest.approx(SCALES.get(name, 1.0), rel=0.02)
    ends = ends_for_drafter(model, facts, scale)
    assert ends.embedding.shape == ends.head.shape == (facts.vocab_size, facts.hidden_size)


def test_the_embedding_and_the_head_that_are_copied_have_the_targets_scales(tmp_path):
    directory = checkpoints.write_target(tmp_path / "t", families.RIGHT["granite"])
    pair = load_pair(target=str(directory), dtype="float32")
    model = pair.target.model
    ends = ends_for_drafter(model, pair.target.facts, 0.5)
    assert mx.allclose(ends.embedding, 3.0 * model.model.embed_tokens.weight)
    assert mx.allclose(ends.head, 0.5 * model.lm_head.weight)


def test_a_quantised_targets_ends_are_numbers_again(tmp_path):
    directory = checkpoints.write_target(
        tmp_path / "t", families.family("llama", hidden_size=64, tie_word_embeddings=True)
    )
    pair = load_pair(target=str(directory), dtype="float32", target_bits=8)
    target = TappedTarget(pair.target.model, (0,))
    assert target.logit_scale(None) == 1.0
    ends = ends_for_drafter(pair.target.model, pair.target.facts, 1.0)
    rows = pair.target.model.model.embed_tokens(mx.arange(ends.embedding.shape[0]))
    assert mx.allclose(ends.embedding, rows, atol=1e-6)
    assert mx.array_equal(ends.head, ends.embedding)
