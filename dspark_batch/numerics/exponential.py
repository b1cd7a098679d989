"""Exponentials, as fast as a device has them."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from dspark_batch import device

_LEAST, _MOST = -88.02969, 88.0  # what is less counts as the least, to which e is 0 here
_MANTISSA, _BIAS = 2**23, 127  # values of a float32's mantissa; what it adds to its exponent
_LOG2_E = 1.44269504
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; the high part has 10 bits
# Of 1 + r + a r^2 + b r^3 + c r^4 + d r^5, the nearest one to e^r for r within 0.35.
_A, _B, _C, _D = 0.49999231, 0.16667116, 0.041890331, 0.0083125019
_SHAPES = 512  # that loops are kept for, some 10 MB; a job of 64 prompts has 210


def exp(numbers: mx.array) -> mx.array:
    """Raise e to float32 numbers of at most 88, on a CPU within 3e-7 of the result.

    MLX's Linux wheel is built for any x86 processor, so on a CPU each step of its exponential calls
    a function that emulates one instruction: 22 ns a number, where `pow` of the C library takes 6.5
    and the two loops here take 1.4. MLX has a compiler make them; without one it runs their steps.
    """
    if not device.is_cpu():
        return mx.exp(numbers)
    found: Any = _on_a_cpu(numbers)  # its stub says no more than `object`
    powers: mx.array = found
    return powers


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute `gate * sigmoid(gate) * up`, the activation of most models' MLPs; any shape."""
    wide = mx.maximum(gate.astype(mx.float32), -_MOST)  # so that its negative has a power
    return (wide / (1 + exp(-wide))).astype(gate.dtype) * up


@mx.custom_function  # a bit pattern has no slope
def _on_a_cpu(numbers: mx.array) -> mx.array:
    """Compute e**r * 2**n of numbers r + n ln 2, where n is whole and r within 0.35.

    Source:
        Cody and Waite 1980, Software Manual for the Elementary Functions, chapter 6.
    """
    exponent = _loop(_exponent, numbers.shape)(numbers)
    return _loop(_raised, numbers.shape)(numbers, exponent, exponent.view(mx.float32))


@_on_a_cpu.vjp
def _slope(numbers: mx.array, cotangent: mx.array, result: mx.array) -> mx.array:
    return cotangent * result


def _exponent(numbers: mx.array) -> mx.array:
    """Give the bits of 2**n, int32: an exponent and no mantissa."""
    shifted = numbers * (_LOG2_E * _MANTISSA) + (_BIAS + 0.5) * _MANTISSA
    return mx.maximum(shifted.astype(mx.int32), 0) & -_MANTISSA


def _raised(numbers: mx.array, exponent: mx.array, power: mx.array) -> mx.array:
    """Compute e**r * 2**n; every product with n is exact."""
    exponent = exponent.astype(mx.float32)
    high, low = (exponent * (ln2 / _MANTISSA) - _BIAS * ln2 for ln2 in (_LN2_HIGH, _LN2_LOW))
    rest = (mx.maximum(numbers, _LEAST) - high) - low
    square = rest * rest
    series = (_A + _B * rest) + square * (_C + _D * rest)
    return (1 + rest) * power + (square * power) * series


@lru_cache(_SHAPES)
def _loop(steps: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., Any]:
    """Compile elementwise steps into one loop, for one shape.

    MLX looks for a shape among all that a function has had, and cannot join steps for any shape.
    """

    def of_this_shape(*arrays: mx.array) -> Any:  # noqa: ANN401  as the steps
        return steps(*arrays)

    return mx.compile(of_this_shape)
