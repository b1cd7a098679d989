"""Every tensor of the reference, compared within 1e-4 in float32: right tokens prove nothing."""

import mlx.core as mx
import pytest
from golden_cases import largest_difference, load_case

from dspark_batch.engine.cache import RaggedCache
from dspark_batch.numerics.masks import ragged_block
from dspark_batch.numerics.rules import Greedy

TOLERANCE = 1e-4
GREEDY_RUNS = ["greedy0", "greedy1", "greedy2"]


@pytest.fixture(scope="module")
def case():
    return load_case("qwen3_vanilla")


class Replay:
    """The reference's loop over one run, round by round, with the reference's own counts."""

    def __init__(self, case, run):
        self.case, self.run, self.pair = case, run, case.pair
        self.cache = RaggedCache(self.pair.target.num_caches, 1)
        self.context = RaggedCache(self.pair.drafter.num_layers, 1)
        for cache in (self.cache, self.context):
            cache.reserve(128)
        self.prompt_logits = self._step(case[f"{run}.prompt_ids"][None], stay=None)

    def rounds(self):
        recorded = f"{self.run}.rounds."
        for index in range(self.case[recorded + "start"].shape[0]):
            anchor = self.case[recorded + "draft_input_ids"][index, :1]
            yield index, anchor
            drafts = self.case[recorded + "draft_tokens"][index][None]
            tokens = mx.concatenate([anchor[None], drafts], axis=1)
            self.verify_logits = self._step(tokens, self.case[recorded + "accepted"][index] + 1)

    def block(self, anchor):
        drafter, size = self.pair.drafter, self.pair.drafter.block_size
        masks = mx.full((1, size - 1), drafter.config.mask_token_id, dtype=mx.int32)
        visible = ragged_block(self.context.lengths, size, self.context.capacity)
        ids = mx.concatenate([anchor[None], masks], axis=1)
        offset = self.context.lengths[:, None]
        return drafter.block_hidden(ids, self.context.layers, offset, visible)

    def propose(self, anchor):
        size = self.pair.drafter.block_size
        return self.pair.drafter.propose(anchor, self.context, size, Greedy().draft)

    def _step(self, tokens, stay):
        logits, self.features = self.pair.target(tokens, self.cache.layers)
        self.pair.drafter.extend(self.context, self.features)
        stay = tokens.shape[1] if stay is None else stay
        self.cache.keep(mx.array(stay).reshape(1))
        self.context.keep(mx.array(stay).reshape(1))
        return logits[0]


def test_the_tapped_target_gives_the_reference_features_and_logits(case):
    replay = Replay(case, "greedy0")
    assert largest_difference(replay.prompt_logits, case["prefill.logits"]) < TOLERANCE
    assert largest_difference(replay.features[0], case["prefill.tap_features"]) < TOLERANCE


def test_the_fused_context_is_the_reference_context(case):
    fused = case.pair.drafter.fuse(case["prefill.tap_features"])
    assert largest_difference(fused, case["prefill.fused_context"]) < TOLERANCE


@pytest.mark.parametrize("run", GREEDY_RUNS)
def test_block_output_and_base_logits_of_every_round(case, run):
    replay = Replay(case, run)
    for index, anchor in replay.rounds():
        hidden = replay.block(anchor)[0]
        base = case.pair.drafter.base_logits(hidden)
        recorded = f"{run}.rounds."
        assert largest_difference(hidden, case[recorded + "block_hidden"][index]) < TOLERANCE
        assert largest_difference(base, case[recorded + "base_logits"][index]) < TOLERANCE


@pytest.mark.parametrize("run", GREEDY_RUNS)
def test_drafts_corrected_logits_and_confidence_of_every_round(case, run):
    replay = Replay(case, run)
    for index, anchor in replay.rounds():
        draft, recorded = replay.propose(anchor), f"{run}.rounds."
        assert draft.tokens[0].tolist() == case[recorded + "draft_tokens"][index].tolist()
        corrected = case[recorded + "corrected_logits"][index]
        assert largest_difference(draft.logits[0], corrected) < TOLERANCE
        confidence = case[recorded + "confidence_logits"][index]
        assert largest_difference(draft.confidence[0], confidence) < TOLERANCE


@pytest.mark.parametrize("run", GREEDY_RUNS)
def test_verify_logits_of_every_round(case, run):
    replay = Replay(case, run)
    previous = None
    for index, _ in replay.rounds():
        if previous is not None:
            recorded = case[f"{run}.rounds.verify_logits"][previous]
            assert largest_difference(replay.verify_logits, recorded) < TOLERANCE
        previous = index


def test_the_drafters_keys_and_values_of_the_first_two_rounds(case):
    replay = Replay(case, "greedy0")
    for index, anchor in replay.rounds():
        if index == 2:
            return
        mx.eval(replay.block(anchor))
        for number, layer in enumerate(replay.context.layers):
            keys, values = (
                case[f"round{index}.keys.{number}"],
                case[f"round{index}.values.{number}"],
            )
            length = keys.shape[1]
            assert largest_difference(layer.keys[0, :, :length], keys) < TOLERANCE
            assert largest_difference(layer.values[0, :, :length], values) < TOLERANCE


def test_a_shorter_draft_is_a_prefix_of_a_longer_one(case):
    replay = Replay(case, "greedy1")
    _, anchor = next(replay.rounds())
    whole = replay.propose(anchor)
    short = case.pair.drafter.propose(anchor, replay.context, 3, Greedy().draft)
    assert short.tokens.tolist() == whole.tokens[:, :3].tolist()
    assert mx.array_equal(short.logits, whole.logits[:, :3])
