"""One training step against DeepSpec's own, loss terms and gradients."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from dspark_batch.drafters.drafter_config import DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.train.blocks import (
    Answers,
    block_mask,
    draw_anchors,
    make_blocks,
    slot_positions,
    teacher_forced,
)
from dspark_batch.train.learn import freeze_ends
from dspark_batch.train.loss import DFLASH, DSPARK, draft_loss
from dspark_batch.train.teacher import TappedTarget

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [("qwen3_vanilla", DSPARK), ("qwen3_dflash", DFLASH)]


@pytest.fixture(params=CASES, ids=[name for name, _ in CASES])
def step(request):
    name, mix = request.param
    drafter = _drafter(GOLDEN / name / "drafter")
    freeze_ends(drafter)
    return drafter, mx.load(str(GOLDEN / name / "train.safetensors")), mix


def _drafter(directory):
    config = json.loads((directory / "config.json").read_text())
    drafter = DSparkDrafter(DrafterConfig.from_dict(config))
    drafter.load_weights(str(directory / "model.safetensors"))
    return drafter


def _parts(golden):
    batch = Answers(golden["input_ids"], golden["loss_mask"] > 0)
    kept = golden["block_keep_mask"] > 0
    blocks = make_blocks(batch, golden["anchor_positions"], kept, size=7)
    return batch, blocks, kept


def _target_logits(drafter, golden, blocks):
    """The tied target's own logits where each slot drafts."""
    hidden = golden["target_last_hidden_states"]
    position = slot_positions(blocks, hidden.shape[1])
    logits = drafter.lm_head(mx.take_along_axis(hidden, position[..., None], axis=1))
    return logits.reshape(*blocks.labels.shape, -1)


def _largest_gap(a, b):
    return mx.abs(a - b).max().item()


def test_labels_and_masks_are_the_reference_ones(step):
    _, golden, _ = step
    _, blocks, kept = _parts(golden)
    assert mx.array_equal(blocks.counts, golden["eval_mask"] > 0)
    assert mx.array_equal(
        mx.where(blocks.counts, blocks.labels, 0),
        mx.where(golden["eval_mask"] > 0, golden["target_ids"], 0),
    )
    assert kept.any()


def test_logits_are_the_reference_ones(step):
    drafter, golden, _ = step
    batch, blocks, kept = _parts(golden)
    drafts = teacher_forced(drafter, golden["target_hidden_states"], batch.tokens, blocks)
    kept = kept[..., None, None]
    assert _largest_gap(drafts.logits * kept, golden["draft_logits"] * kept) < 1e-4
    counts = blocks.counts[..., None]
    aligned = _target_logits(drafter, golden, blocks)
    assert _largest_gap(aligned * counts, golden["aligned_target_logits"] * counts) < 1e-4


def test_the_target_teaches_what_the_reference_target_knows(step):
    drafter, golden, _ = step
    model, _ = load_model(GOLDEN / "targets" / "qwen3_tiny")
    target = TappedTarget(model, drafter.tap_ids)
    batch, blocks, _ = _parts(golden)
    positions = slot_positions(blocks, batch.tokens.shape[1])
    features, logits = target.teach(batch.tokens, positions)
    assert _largest_gap(features, golden["target_hidden_states"]) < 1e-4
    counts = blocks.counts[..., None]
    logits = logits.reshape(*blocks.labels.shape, -1)
    assert _largest_gap(logits * counts, golden["aligned_target_logits"] * counts) < 1e-4


def test_loss_terms_and_gradients_are_the_reference_ones(step):
    drafter, golden, mix = step
    batch, blocks, _ = _parts(golden)

    def loss(params):
        drafter.update(params)
        drafts = teacher_forced(drafter, golden["target_hidden_states"], batch.tokens, blocks)
        return draft_loss(drafts, _target_logits(drafter, golden, blocks), blocks, mix)

    values, grads = mx.value_and_grad(loss)(drafter.trainable_parameters())

    for value, name in zip(values[1:4], ("ce", "l1", "confidence"), strict=True):
        if f"loss.{name}_loss_num" in golden:
            num, den = golden[f"loss.{name}_loss_num"], golden[f"loss.{name}_loss_den"]
            if den.item() > 0:
                assert value.item() == pytest.approx((num / (den + 1e-6)).item(), abs=1e-4), name
    assert values[0].item() == pytest.approx(golden["loss.total"].item(), abs=1e-4)
    expected = {key[5:]: value for key, value in golden.items() if key.startswith("grad.")}
    found = dict(tree_flatten(grads))
    assert found.keys() == expected.keys()
    gaps = {name: _largest_gap(found[name], expected[name]) for name in expected}
    assert max(gaps.values()) < 1e-5, gaps


def test_anchors_are_positions_followed_by_another_answer_token():
    answers = mx.array([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1]]) > 0
    anchors, kept = draw_anchors(answers, 3, mx.random.key(1))
    assert anchors.tolist() == [[2, 3, 0], [4, 0, 0]]
    assert kept.tolist() == [[True, True, False], [True, False, False]]


def test_a_block_sees_the_context_before_its_anchor_and_itself():
    mask = block_mask(mx.array([[1, 3]]), size=2, length=4)
    assert mask[0, 0].astype(mx.int32).tolist() == [
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]
