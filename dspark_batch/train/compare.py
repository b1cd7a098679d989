"""How far drafts are from a label and from the target's distribution, over a whole vocabulary.

A step has some hundred million of these logits, so what takes time is reading and writing them. The
gradient is written down here: two distributions are kept, and nothing else of their size.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from dspark_batch import device


class Comparison(NamedTuple):
    """What a loss needs of each slot, float32."""

    surprise: mx.array  # [...], cross entropy of the label
    distance: mx.array  # [...], L1 distance of the distributions, 0 to 2


def compare(logits: mx.array, known: mx.array, labels: mx.array) -> Comparison:
    """Compare drafted logits with the labels and with the target's logits.

    Args:
        logits: [..., V]; only they get a gradient.
        known: [..., V], the target's.
        labels: [...] int32.
    """
    found: Any = _compare(logits, known, labels)
    return Comparison(found[0], found[1])


def _fused(plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Make one pass of an elementwise function; a CPU compiles for seconds and gains little."""
    compiled = mx.compile(plain)

    def run(*arrays: mx.array) -> mx.array:
        return (plain if device.is_cpu() else compiled)(*arrays)

    return run


@_fused
def _gap(q: mx.array, p: mx.array) -> mx.array:
    return mx.abs(q.astype(mx.float32) - p.astype(mx.float32))


@_fused
def _signed(q: mx.array, p: mx.array) -> mx.array:
    return mx.sign(q.astype(mx.float32) - p.astype(mx.float32)) * q.astype(mx.float32)


def _wide_slope(q: mx.array, p: mx.array, even: mx.array, far: mx.array) -> mx.array:
    wide = q.astype(mx.float32)
    return wide * (even + far * mx.sign(wide - p.astype(mx.float32)))


@_fused
def _slope(q: mx.array, p: mx.array, even: mx.array, far: mx.array) -> mx.array:
    return _wide_slope(q, p, even, far).astype(q.dtype)


@mx.custom_function
def _compare(logits: mx.array, known: mx.array, labels: mx.array) -> tuple[mx.array, ...]:
    q, p = (mx.softmax(each, axis=-1, precise=True) for each in (logits, known))
    # The sum of the exponentials, by the largest: exact enough in any type, and never log(0).
    largest = q.max(axis=-1).astype(mx.float32)
    total = logits.max(axis=-1).astype(mx.float32) - mx.log(largest)
    label = mx.take_along_axis(logits, labels[..., None], axis=-1).squeeze(-1)
    lean = _signed(q, p).sum(axis=-1)
    return total - label.astype(mx.float32), _gap(q, p).sum(axis=-1), lean, q, p


@_compare.vjp
def _backward(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
) -> tuple[mx.array, ...]:
    """Give the gradient of the drafted logits.

    That of cross entropy is q minus 1 at the label; with s = sign(q - p), that of the distance is
    q (s - sum(s q)).
    """
    _, known, labels = primals
    _, _, lean, q, p = outputs
    entropy, far, lean, label = (each[..., None] for each in (*cotangents[:2], lean, labels))
    even = entropy - far * lean
    # The label's by itself: a pass over everything has no ids to compare then.
    q_of, p_of = (mx.take_along_axis(each, label, axis=-1) for each in (q, p))
    own = (_wide_slope(q_of, p_of, even, far) - entropy).astype(q.dtype)
    slope = mx.put_along_axis(_slope(q, p, even, far), label, own, axis=-1)
    return slope, mx.zeros_like(known), mx.zeros_like(labels)
