"""The reference's rounds run by ours: same inputs, same counts, so that all tensors compare."""

import mlx.core as mx
from golden_cases import load_case

from dspark_batch.numerics.masks import ragged_block
from dspark_batch.numerics.rules import Greedy


class Replay:
    """The reference's loop over one run, round by round, with the reference's own counts."""

    def __init__(self, name, run):
        self.case, self.run = load_case(name), run
        self.pair = self.case.pair
        self.cache = self.pair.target.make_cache(1, 0)
        self.context = self.pair.drafter.make_cache(1, 0)
        for cached in (self.cache, self.context):
            cached.reserve(128)
        self.prompt_logits = self.step(self.case[f"{run}.prompt_ids"][None], stay=None)

    def recorded(self, name):
        return self.case[f"{self.run}.rounds.{name}"]

    def rounds(self):
        for index in range(self.recorded("start").shape[0]):
            anchor = self.recorded("draft_input_ids")[index, :1]
            yield index, anchor
            drafts = self.recorded("draft_tokens")[index][None]
            tokens = mx.concatenate([anchor[None], drafts], axis=1)
            self.verify_logits = self.step(tokens, self.recorded("accepted")[index] + 1)

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

    def step(self, tokens, stay):
        logits, self.features = self.pair.target(tokens, self.cache)
        self.pair.drafter.extend(self.context, self.features)
        stay = tokens.shape[1] if stay is None else stay
        self.cache.keep(mx.array(stay).reshape(1))
        self.context.keep(mx.array(stay).reshape(1))
        return logits[0]
