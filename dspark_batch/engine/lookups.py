"""Who drafts for a slot: the drafter, or its own text, where that is likelier to be right.

What is looked up is compared with what came, also where the drafter drafted. So nothing has to be
tried to be known.
"""

from collections.abc import Sequence as ListLike

import mlx.core as mx

from dspark_batch.drafters.drafter import Drafter
from dspark_batch.drafters.lookup import LONGEST_MATCH, Judged, OnlyLookUps, TextIndex
from dspark_batch.engine.sequence import Sequence
from dspark_batch.pair import Pair
from dspark_batch.tuning.pace import Acceptance

_PRIOR, _PRIOR_WEIGHT = 0.5, 4.0  # the chance that a token is right, and tokens that it counts for
_FADE = 0.5 ** (1 / 256)  # what was judged counts half after 256 more


def with_look_ups(pair: Pair) -> Pair:
    """Give rounds of a pair room for drafts, if it has no drafter."""
    has_drafter = pair.drafter.block_size > 0
    return pair if has_drafter else pair._replace(drafter=OnlyLookUps())


class LookUps:
    """Looks up drafts for slots; the engine owns it.

    Args:
        drafter: who drafts otherwise.
        slots: most of them.
        is_on: whether anybody looks up.

    Attributes:
        found: by slot, what is drafted in this round; []: nothing, or the drafter promises more.
    """

    def __init__(self, drafter: Drafter, slots: int, *, is_on: bool) -> None:
        self.is_on = is_on
        self.found: list[list[int]] = []
        self._drafts = drafter.num_layers > 0
        self._drafted = Acceptance(slots)  # what the drafter drafts
        self._judged = [(0.0, 0.0)] * (1 + LONGEST_MATCH)  # by match: right, seen; faded

    def find(self, sequences: ListLike[Sequence | None], num_drafts: int) -> None:
        """Look up drafts for each slot of the next round."""
        self.found = [[] for _ in sequences]
        if not self.is_on or num_drafts == 0:
            return
        promised = self._promised(num_drafts)
        expected = sum(self._drafted.survival(num_drafts)) if self._drafts else 0.0
        for slot, sequence in enumerate(sequences):
            found = self._text_of(sequence).find(num_drafts) if sequence else None
            if found and sequence and (promised[found.match] > expected or not sequence.is_served):
                self.found[slot] = found.tokens

    def over(self, drafts: mx.array, verify_len: mx.array) -> tuple[mx.array, mx.array]:
        """Put what was found in the place of drafts [S, l] to verify, and of their number [S]."""
        num_drafts = max(map(len, self.found))
        if num_drafts == 0:
            return drafts, verify_len
        tokens = mx.array([found or [0] * num_drafts for found in self.found], dtype=mx.int32)
        is_found = mx.array([len(found) > 0 for found in self.found])
        drafts = mx.pad(drafts, [(0, 0), (0, num_drafts - drafts.shape[1])])
        verify_len = mx.where(is_found, num_drafts, verify_len)
        return mx.where(is_found[:, None], tokens, drafts), verify_len

    def learn(self, slot: int, num_accepted: int, num_drafted: int) -> None:
        """Learn from a round how good the drafter is, if it drafted for this slot."""
        if not self.found[slot]:
            self._drafted.add(num_accepted, num_drafted)

    def _text_of(self, sequence: Sequence) -> TextIndex:
        """Bring a sequence's text up to what is committed, and learn from what came."""
        prompt_ids = sequence.request.prompt_ids
        if sequence.text is None:
            sequence.text = TextIndex(prompt_ids)
        came = sequence.token_ids[len(sequence.text) - len(prompt_ids) :]
        if judged := sequence.text.add(came):
            self._learn(judged)
        return sequence.text

    def _promised(self, num_drafts: int) -> list[float]:
        """Expect the tokens that are right in a row, of so many, by match."""
        chances = [
            (right + _PRIOR * _PRIOR_WEIGHT) / (seen + _PRIOR_WEIGHT)
            for right, seen in self._judged
        ]
        return [sum(chance**n for n in range(1, 1 + num_drafts)) for chance in chances]

    def _learn(self, judged: Judged) -> None:
        right, seen = self._judged[judged.match]
        self._judged[judged.match] = (_FADE * right + judged.right, _FADE * seen + judged.seen)
