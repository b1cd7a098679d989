"""The shape class: passes of which a probe has shown that they give the same bits."""

from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from dspark_batch.types import Json

_IS_CPU = mx.default_device() == mx.Device(mx.cpu)

Shape = tuple[int, int]  # slots and width of a pass

# Of a prefill pass without a class: width, which keeps its scores small, and tokens. A GPU compiles
# for each pass, so there widths come in steps, as slots do; a pass is no narrower than a step.
_FREE_WIDTH, _FREE_TOKENS = 256, 2048
_FREE_STEP, _FREE_PROMPTS = (1, _FREE_TOKENS // 8) if _IS_CPU else (32, _FREE_TOKENS // 32)


@dataclass(frozen=True, slots=True)
class Shapes:
    """Which passes the engine may run; the default is all, as `--mode fast` has it.

    Inside a class, padding, batching and draft lengths change no bit of a token's logits.

    Source:
        DESIGN.md, section 4.
    """

    steps: tuple[Shape, ...] = ()  # target passes of a round; (): any
    prefill: tuple[Shape, ...] = ()  # target passes over prompts; (): any
    least_capacity: int = 0  # positions of the cache's buffers
    folds: bool = False  # attention of rounds folds query heads together

    def slots_for(self, slots: int, widest: int) -> int:
        """Say over how many slots a pass must run that holds some, in rounds up to a width.

        Without a class it is the number itself, or on a GPU, which compiles for each, a power of 2.

        Raises:
            ValueError: no pass of the class is that large.
        """
        if not self.steps:
            return _free(slots)
        return _smallest(self.steps, slots, widest)[0]

    def width(self, slots: int, width: int) -> int | None:
        """Say how wide a pass over that many slots must be; None: there is none so wide."""
        if not self.steps:
            return width
        wide = (known for count, known in self.steps if count == slots and known >= width)
        return min(wide, default=None)

    @property
    def most_width(self) -> int:
        """The width of the widest round; 0: any."""
        return max((width for _, width in self.steps), default=0)

    @property
    def most_prompts(self) -> int:
        """How many prompts one prefill pass can take."""
        return max((slots for slots, _ in self.prefill), default=_FREE_PROMPTS)

    def prefill_pass(self, prompts: int, length: int) -> Shape:
        """Choose the pass for prompts of which the longest has `length` tokens left."""
        if not self.prefill:
            slots, width = _free(prompts), -(-length // _FREE_STEP) * _FREE_STEP
            return slots, min(width, _FREE_WIDTH, max(_FREE_STEP, _FREE_TOKENS // slots))
        slots = min(count for count, _ in self.prefill if count >= prompts)
        widest = max(width for count, width in self.prefill if count == slots)
        return _smallest(self.prefill, slots, min(length, widest))

    def to_json(self) -> dict[str, Json]:
        """Describe it for the manifest."""
        return {
            "steps": self.steps,
            "prefill": self.prefill,
            "least_capacity": self.least_capacity,
            "folds": self.folds,
        }

    @classmethod
    def from_json(cls, described: dict[str, Json]) -> Self:
        """Read what `to_json` wrote."""
        known = dict(described)
        for name in ("steps", "prefill"):
            known[name] = tuple((slots, width) for slots, width in known[name])
        return cls(**known)


def _free(slots: int) -> int:
    return slots if _IS_CPU else 1 << (slots - 1).bit_length()


def _smallest(shapes: tuple[Shape, ...], slots: int, width: int) -> Shape:
    fitting = [shape for shape in shapes if shape[0] >= slots and shape[1] >= width]
    if not fitting:
        raise ValueError(
            f"{slots} slots with {width} tokens each: no pass of the shape class is that large "
            f"(largest: {max(shapes)}). Take fewer, or --mode fast."
        )
    return min(fitting, key=lambda shape: (shape[0] * shape[1], shape))
