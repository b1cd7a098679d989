"""Slots and widths of the passes that run."""

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_batch import device
from dspark_batch.numerics.attention import BLOCK, has_beginnings

_IS_CPU = device.is_cpu()

Shape = tuple[int, int]  # slots and width of a pass

# Of a prefill pass: width, which keeps its scores small, and tokens. A GPU compiles for each pass,
# so there widths come in steps, as slots do, and few numbers of prompts go together; a pass is no
# narrower than a step. A CPU gains nothing from more prompts than a few.
_WIDTH, _TOKENS = 256, 2048
_STEP, _TOGETHER = (1, range(1, 9)) if _IS_CPU else (32, (8, 16, 32, 64))
# Tokens that are computed in the time that a pass takes besides: a pass of an H200 over a target of
# 4 billion weights takes 10.5 ms and 12.9 us for each token.
_PASS_ROWS = 40 if _IS_CPU else 800

# What packing costs is paid by so many tokens that are left out, and such a share of a pass.
_LEAST_LEFT_OUT, _LEAST_SHARE_LEFT_OUT = 16, 0.15

_LEAST_SHARING = 4  # slots for which a beginning is worth an array of its own

FALLBACK: Shape = (16, 8)  # of a target whose bits depend on the shape of a pass


@dataclass(frozen=True, slots=True)
class Shapes:
    """Which passes run: any, or one only.

    Any shape gives a token the same bits, since products run over safe rows. A target for which
    that does not hold has one fixed shape for all of its passes; then every pass is padded to it.

    Attributes:
        fixed: slots and width of the only pass; None: any.
        packed: whether a token has the same bits, too, in a pass over some tokens of each slot.
    """

    fixed: Shape | None = None
    packed: bool = True

    def slots_for(self, slots: int) -> int:
        """Say over how many slots a pass runs that holds some; a GPU compiles for each number."""
        if self.fixed is not None:
            return self.fixed[0]
        return slots if _IS_CPU else 1 << (slots - 1).bit_length()

    def width(self, width: int) -> int:
        """Say how wide a pass is that has so many tokens of a slot."""
        return width if self.fixed is None else self.fixed[1]

    def jumps(self, most: int) -> tuple[int, ...]:
        """List how many drafts a round may have whose drafts are forced, ascending from 0."""
        most = min(most, self.fixed[1] - 1) if self.fixed is not None else most
        return tuple(range(1 + most)) if _IS_CPU else tuple(sorted({0, most}))

    @property
    def most_prompts(self) -> int:
        """How many prompts one prefill pass can take."""
        return _TOGETHER[-1] if self.fixed is None else self.fixed[0]

    def num_together(self, lengths: Sequence[int]) -> int:
        """Say how many prompts, from the first one on, go through together.

        All of a pass are padded to the longest. So prompts are split where that is less work than
        one pass over all; `lengths` are their tokens.
        """
        if self.fixed is not None:
            return len(lengths)
        least, together = [0], 0  # work for the last prompts, by number; those of the first pass
        for first in reversed(range(len(lengths))):
            longest, tried = 0, []
            for number, length in enumerate(lengths[first:], 1):
                longest = max(longest, length)
                if number in _TOGETHER or first + number == len(lengths):
                    tried.append((self._work(number, longest) + least[-number], number))
            work, together = min(tried)
            least.append(work)
        return together

    def packs(self, used: int, tokens: int) -> bool:
        """Whether a pass leaves out tokens that nobody reads, of which so many are used.

        A GPU compiles for each number.
        """
        is_worth = tokens - used >= max(_LEAST_LEFT_OUT, _LEAST_SHARE_LEFT_OUT * tokens)
        return _IS_CPU and self.packed and self.fixed is None and is_worth

    def share(self, slots: int) -> bool:
        """Whether so many slots that begin alike keep their beginning once."""
        return slots >= _LEAST_SHARING and self.fixed is None and has_beginnings()

    def _work(self, prompts: int, longest: int) -> int:
        """Count the tokens of passes over some prompts, and those that the passes take besides."""
        slots, width = self.prefill_pass(prompts, longest)
        padded = -(-longest // _STEP) * _STEP
        return -(-longest // width) * _PASS_ROWS + slots * padded

    def num_scored(self, positions: int) -> int:
        """Say at how many positions of a slot a pass scores that needs so many."""
        return -(-positions // _STEP) * _STEP

    def prefill_pass(self, prompts: int, length: int, most_tokens: int = _TOKENS) -> Shape:
        """Choose the pass for prompts of which the longest has `length` tokens left.

        It has at most `most_tokens`, if they are enough for the narrowest pass.
        """
        if self.fixed is not None:
            return self.fixed
        slots, width = self.slots_for(prompts), -(-length // _STEP) * _STEP
        most = min(_TOKENS, most_tokens) // slots // _STEP * _STEP
        return slots, min(width, _WIDTH, max(_STEP, most))


def common_len(prompts: Sequence[Sequence[int]]) -> int:
    """Count the first positions, whole blocks, that prompts have in common; each has more."""
    if not prompts:
        return 0
    first, length = prompts[0], (min(map(len, prompts)) - 1) // BLOCK * BLOCK
    for ids in prompts[1:]:
        if ids[:length] != first[:length]:
            pairs = enumerate(zip(ids, first, strict=False))
            length = next(at for at, (one, other) in pairs if one != other) // BLOCK * BLOCK
    return length
