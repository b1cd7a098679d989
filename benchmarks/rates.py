"""What a device can do at most: its matrix rate and its bandwidth, nominal and measured."""

import time
from statistics import median

import mlx.core as mx

from benchmarks.common import busy_share

_COUNTED_S = 4.0

# Dense bf16 operations and bytes per second, from the data sheets of the SXM modules.
NOMINAL = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


def nominal_rates():
    """Return operations and bytes per second of this device's data sheet; None if not known."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    name = mx.device_info()["device_name"]
    return next((rates for word, rates in NOMINAL.items() if word in name), None)


def measured_rates(is_toy=False):
    """Return operations per second of one big bf16 product and bytes per second of a copy.

    Each is the fastest median of three in a second: a device may not be at its clock at first.
    """
    size, length = (256, 1 << 16) if is_toy else (8192, 1 << 29)
    left, right = (mx.random.normal((size, size), key=mx.random.key(i)) for i in (1, 2))
    left, right = left.astype(mx.bfloat16), right.astype(mx.bfloat16)
    product_s = least_seconds_of(lambda: left @ right, is_toy)
    source = mx.ones(length, dtype=mx.bfloat16)
    copy_s = least_seconds_of(lambda: source + source, is_toy)
    return 2 * size**3 / product_s, 4 * length / copy_s


def busy_share_of_a_full_device(is_toy=False):
    """Count as `busy_share` does while one product follows another without a pause.

    The next one is sent before the one in front of it has ended.
    """
    left = mx.random.normal((8, 8) if is_toy else (8192, 8192), key=mx.random.key(1))
    left = left.astype(mx.bfloat16)
    mx.eval(left)
    ended = time.perf_counter() + (0.1 if is_toy else _COUNTED_S)
    with busy_share() as share:
        before = left @ left
        mx.async_eval(before)
        while time.perf_counter() < ended:
            after = left @ left
            mx.async_eval(after)
            mx.eval(before)
            before = after
        return share()


def least_seconds_of(make, is_toy=False):
    """Take the least of `seconds_of`, of three tries each, in a second."""
    ended = time.perf_counter() + (0.1 if is_toy else 1.0)
    least = float("inf")
    while time.perf_counter() < ended:
        least = min(least, seconds_of(make, repeats=3, warm_up=0))
    return least


def seconds_of(make, repeats=10, warm_up=2):
    """Take the median time of making and evaluating arrays."""
    times = []
    for number in range(warm_up + repeats):
        mx.synchronize()
        began = time.perf_counter()
        mx.eval(make())
        mx.synchronize()
        if number >= warm_up:
            times.append(time.perf_counter() - began)
    return median(times)
