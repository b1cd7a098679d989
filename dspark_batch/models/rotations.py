"""Lets the layers of a step share the angles of their rotations on a CPU, bit for bit."""

from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from dspark_batch import device
from dspark_batch.numerics.rows import are_as_they_come

Turn: TypeAlias = tuple[mx.array, mx.array]  # what a vector, and its halves exchanged, times

_plain: Any = nn.RoPE.__call__  # its stub knows numbers only as offsets


class _Turns(NamedTuple):
    """What was computed for the positions of a step."""

    offset: mx.array
    found: dict[tuple[int, int, float, float, mx.Dtype], Turn]


_last = _Turns(mx.array(0), {})


def share_angles(model: nn.Module, *, is_drafter: bool = False) -> None:
    """Make the plain rotations of a model compute sines and cosines once a step, on a CPU.

    MLX computes them in each call, which is most of its time there. A module keeps its parameters
    and its place; its class becomes a subclass.

    Args:
        model: has the rotations.
        is_drafter: all passes over it are ours. Of a target, those whose products run as they come
            are mlx-lm's, whose caches change their positions in place.
    """
    if not device.is_cpu():
        return
    for module in model.modules():
        if type(module) is nn.RoPE and not module.traditional:
            module.__class__ = _Shared if is_drafter else _SharedInOurs


class _Shared(nn.RoPE):
    """A rotation of vectors [B, H, T, D] from the positions [B] on, by all of D."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        is_whole = x.ndim == 4 and x.shape[-1] == self.dims
        if not isinstance(offset, mx.array) or offset.ndim != 1 or not is_whole:
            rotated: mx.array = _plain(self, x, offset=offset)
            return rotated
        cosines, sines = self._turn(x, offset)
        half = self.dims // 2
        exchanged = mx.concatenate([x[..., half:], x[..., :half]], axis=-1)
        return x * cosines + exchanged * sines

    def _turn(self, x: mx.array, offset: mx.array) -> Turn:
        """Give cosines and sines [B, 1, T, D], the same arrays while the offset is the same one."""
        global _last
        turns = _last if _last.offset is offset else _Turns(offset, {})
        _last, found = turns, turns.found
        key = (x.shape[2], self.dims, self.base, self.scale, x.dtype)
        if key not in found:
            found[key] = self._computed(x, offset)
        return found[key]

    def _computed(self, x: mx.array, offset: mx.array) -> Turn:
        """Rotate ones in front of zeros: cosines in front of sines come out."""
        half = self.dims // 2
        ones = (mx.arange(self.dims) < half).astype(x.dtype)
        ones = mx.broadcast_to(ones, (offset.shape[0], 1, x.shape[2], self.dims))
        rotated = _plain(self, ones, offset=offset)
        cosines, sines = rotated[..., :half], rotated[..., half:]
        return mx.concatenate([cosines, cosines], -1), mx.concatenate([-sines, sines], -1)


class _SharedInOurs(_Shared):
    """The same, but in mlx-lm's passes it rotates as it did."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if not are_as_they_come():
            return super().__call__(x, offset=offset)
        rotated: mx.array = _plain(self, x, offset=offset)
        return rotated
