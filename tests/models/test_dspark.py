"""Every tensor of the reference, compared within 1e-4 in float32: right tokens prove nothing."""

from dataclasses import replace
from functools import cache

import mlx.core as mx
import pytest
from golden_cases import DENSE, GREEDY_RUNS, largest_difference, load_case
from lockstep import Replay

from dspark_batch.numerics.rules import Greedy

TOLERANCE = 1e-4

every_case = pytest.mark.parametrize("case", DENSE)
every_run = pytest.mark.parametrize("run", GREEDY_RUNS)


@cache
def replayed(name, run):
    """All rounds of a run: what ours gives, stacked over rounds under the reference's names."""
    replay, ours = Replay(name, run), {}
    for _, anchor in replay.rounds():
        hidden, draft = replay.block(anchor)[0], replay.propose(anchor)
        rounds = {
            "block_hidden": hidden,
            "base_logits": replay.pair.drafter.base_logits(hidden),
            "draft_tokens": draft.tokens[0],
            "corrected_logits": draft.logits[0],
        }
        if draft.confidence is not None:
            rounds["confidence_logits"] = draft.confidence[0]
        for key, value in rounds.items():
            ours.setdefault(key, []).append(value)
        ours.setdefault("verify_logits", [])
        if len(ours["block_hidden"]) > 1:
            ours["verify_logits"].append(replay.verify_logits)
    ours["verify_logits"].append(replay.verify_logits)
    ours = {key: mx.stack(values) for key, values in ours.items()}
    mx.eval(ours)
    return ours


def difference(case, run, name):
    return largest_difference(replayed(case, run)[name], load_case(case)[f"{run}.rounds.{name}"])


@every_case
def test_the_tapped_target_gives_the_reference_features_and_logits(case):
    replay = Replay(case, "greedy0")
    assert largest_difference(replay.prompt_logits, replay.case["prefill.logits"]) < TOLERANCE
    features = replay.case["prefill.tap_features"]
    assert largest_difference(replay.features[0], features) < TOLERANCE


@every_case
def test_the_fused_context_is_the_reference_context(case):
    case = load_case(case)
    fused = case.pair.drafter.fuse(case["prefill.tap_features"])
    assert largest_difference(fused, case["prefill.fused_context"]) < TOLERANCE


@every_case
def test_the_drafters_keys_and_values_of_the_first_two_rounds(case):
    replay = Replay(case, "greedy0")
    for index, anchor in replay.rounds():
        if index == 2:
            return
        mx.eval(replay.block(anchor))
        for number, layer in enumerate(replay.context.layers):
            for name, buffer in (("keys", layer.keys), ("values", layer.values)):
                recorded = replay.case[f"round{index}.{name}.{number}"]
                written = buffer[0, :, : recorded.shape[1]]
                assert largest_difference(written, recorded) < TOLERANCE


@every_run
@every_case
def test_block_output_of_every_round(case, run):
    assert difference(case, run, "block_hidden") < TOLERANCE


@every_run
@every_case
def test_base_logits_of_every_round(case, run):
    assert difference(case, run, "base_logits") < TOLERANCE


@every_run
@every_case
def test_drafts_and_corrected_logits_of_every_round(case, run):
    assert difference(case, run, "corrected_logits") < TOLERANCE
    assert difference(case, run, "draft_tokens") == 0


@every_run
@every_case
def test_confidence_of_every_round_and_none_without_a_head(case, run):
    has_head = load_case(case).pair.drafter.has_confidence
    assert has_head == (f"{run}.rounds.confidence_logits" in load_case(case))
    assert ("confidence_logits" in replayed(case, run)) == has_head
    if has_head:
        assert difference(case, run, "confidence_logits") < TOLERANCE


@every_run
@every_case
def test_verify_logits_of_every_round(case, run):
    assert difference(case, run, "verify_logits") < TOLERANCE


@every_case
def test_a_shorter_draft_is_that_of_a_drafter_with_a_shorter_block(case):
    replay = Replay(case, "greedy1")
    _, anchor = next(replay.rounds())
    drafter = replay.pair.drafter
    whole, config = replay.propose(anchor), drafter.config
    short = drafter.propose(anchor, replay.context, 3, Greedy().draft)
    drafter.config = replace(config, block_size=3 if config.anchor_predicts else 4)
    try:
        same = drafter.propose(anchor, replay.context, drafter.block_size, Greedy().draft)
    finally:
        drafter.config = config  # others have this drafter too
    assert drafter.block_size > 3
    assert short.logits.shape[1] == 3
    assert mx.array_equal(short.logits, same.logits)
    assert not mx.array_equal(short.logits, whole.logits[:, :3])  # whose places saw four more
