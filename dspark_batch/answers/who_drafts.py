"""Who drafts for a slot: the drafter, or its own text, where that is likelier to be right.

Whom no drafter drafts for has what its grammar forces, if there is any: it jumps ahead.

What is looked up is compared with what came, also where the drafter drafted. So nothing has to be
tried to be known.
"""

from collections.abc import Sequence as ListLike

import mlx.core as mx

from dspark_batch.answers.sequence import Sequence
from dspark_batch.drafters.drafter import Drafter
from dspark_batch.drafters.lookup import LONGEST_MATCH, Judged, OnlyLookUps, TextIndex
from dspark_batch.pair import Pair
from dspark_batch.tuning.pace import Acceptance, Costs, Kind, Step

_PRIOR, _PRIOR_WEIGHT = 0.5, 4.0  # the chance that a token is right, and tokens that it counts for
_FADE = 0.5 ** (1 / 256)  # what was judged counts half after 256 more


def with_look_ups(pair: Pair) -> Pair:
    """Give rounds of a pair room for drafts, if it has no drafter."""
    has_drafter = pair.drafter.block_size > 0
    return pair if has_drafter else pair._replace(drafter=OnlyLookUps())


class LookUps:
    """Finds drafts for slots without their drafter; the engine owns it.

    Args:
        drafter: who drafts otherwise.
        slots: most of them.
        costs: of rounds.
        jumps: how many drafts a round may have that no drafter runs in, ascending from 0; (0,):
            what a grammar forces is no draft of such a round.
        is_on: whether anybody looks up.

    Attributes:
        found: by slot, what is drafted in this round; []: nothing, or the drafter promises more.
        looked_up: slots whose text said so.
        kind: of this round.
    """

    def __init__(
        self,
        drafter: Drafter,
        slots: int,
        costs: Costs,
        *,
        jumps: ListLike[int] = (0,),
        is_on: bool = False,
    ) -> None:
        self.is_on = is_on
        self.found: list[list[int]] = []
        self.looked_up: set[int] = set()
        self.kind = Kind(slots, drafter.block_size)
        self._costs = costs
        self._jumps = jumps
        self._has_drafter = drafter.block_size > 0
        self._drafts = drafter.num_layers > 0
        self._drafted = Acceptance(slots)  # what the drafter drafts
        self._judged = [(0.0, 0.0)] * (1 + LONGEST_MATCH)  # by match: right, seen; faded

    def find(self, sequences: ListLike[Sequence | None], step: Step) -> None:
        """Find drafts for each slot of the next round."""
        self.found, self.looked_up = [[] for _ in sequences], set()
        num_drafts, runs = step.draft_length, self._forced(sequences, step)
        is_jump = any(runs) and not any(self._serves(s, step) for s in sequences)
        if is_jump and not (self.is_on and num_drafts):
            known = [len(run) for run, s in zip(runs, sequences, strict=True) if s]
            num_drafts = self._costs.worth(known, len(sequences), self._jumps)
        is_alone = self.is_on and self._drafts and not (any(runs) or step.keeps_context)
        if is_alone:
            num_drafts, is_jump = self._look_up_alone(sequences), True
        rests = num_drafts == 0 and not step.keeps_context
        is_jump = is_jump and num_drafts > 0
        self.kind = Kind(len(sequences), num_drafts, is_jump=is_jump, rests=rests)
        if self.is_on and num_drafts > 0 and not is_alone:
            self._look_up(sequences, num_drafts)
        for slot, run in enumerate(runs):
            if self.found[slot][: len(run)] != run[:num_drafts]:  # else the text goes on behind it
                self.found[slot] = run[:num_drafts]
                self.looked_up.discard(slot)

    def over(
        self, drafts: mx.array, verify_len: mx.array, most: ListLike[int]
    ) -> tuple[mx.array, mx.array, ListLike[int]]:
        """Put what was found in the place of drafts [S, l] to verify.

        Also in that of their number, [S], and of what the host knows to be the most of it.
        """
        if not any(self.found):
            return drafts, verify_len, most
        num_drafts = self.kind.draft_length
        tokens = [[*found, *[0] * (num_drafts - len(found))] for found in self.found]
        lengths = mx.array(list(map(len, self.found)), dtype=mx.int32)
        drafts = mx.pad(drafts, [(0, 0), (0, num_drafts - drafts.shape[1])])
        verify_len = mx.where(lengths > 0, lengths, verify_len)
        drafts = mx.where(lengths[:, None] > 0, mx.array(tokens, mx.int32), drafts)
        pairs = zip(self.found, most, strict=True)
        return drafts, verify_len, [len(found) or drafted for found, drafted in pairs]

    def learn(self, slot: int, num_accepted: int, num_drafted: int) -> None:
        """Learn from a round how good the drafter is, if it drafted for this slot."""
        if not self.found[slot]:
            self._drafted.add(num_accepted, num_drafted)

    def _look_up(self, sequences: ListLike[Sequence | None], num_drafts: int) -> None:
        """Look up drafts for each slot."""
        promised = self._promised(num_drafts)
        expected = sum(self._drafted.survival(num_drafts)) if self._drafts else 0.0
        for slot, sequence in enumerate(sequences):
            found = self._text_of(sequence).find(num_drafts) if sequence else None
            if found and sequence and (promised[found.match] > expected or not sequence.is_served):
                self.found[slot] = found.tokens
                self.looked_up.add(slot)

    def _look_up_alone(self, sequences: ListLike[Sequence | None]) -> int:
        """Look up drafts while the drafter rests; return how many of each slot pay, maybe none."""
        longest = self._jumps[-1]
        if longest == 0:
            return 0
        texts = [
            self._text_of(sequence).find(longest) if sequence else None for sequence in sequences
        ]
        matches = [found.match for found in texts if found]
        num_others = sum(map(bool, sequences)) - len(matches)

        def rate(length: int) -> float:
            promised = self._promised(length)
            tokens = num_others + sum(1 + promised[match] for match in matches)
            kind = Kind(len(sequences), length, is_jump=length > 0, rests=length == 0)
            return tokens / self._costs.round_s(kind)

        most = max(self._jumps, key=rate)
        for slot, found in enumerate(texts):
            if found and most:
                self.found[slot] = found.tokens[:most]
                self.looked_up.add(slot)
        return most

    def _forced(self, sequences: ListLike[Sequence | None], step: Step) -> list[list[int]]:
        """List, by slot, what its grammar forces next, where the drafter does not draft."""
        # A round that shows the pace what it takes without drafts has none.
        is_trial = step.draft_length == 0 and step.keeps_context and self._has_drafter
        if is_trial or len(self._jumps) == 1:
            return [[] for _ in sequences]
        return [s.forced() if s and not self._serves(s, step) else [] for s in sequences]

    def _serves(self, sequence: Sequence | None, step: Step) -> bool:
        """Whether the drafter drafts for a sequence."""
        is_served = sequence is not None and sequence.is_served
        return is_served and self._drafts and step.draft_length > 0

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
