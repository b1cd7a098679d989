"""What a device can do at most: its matrix rate and its bandwidth, nominal and measured."""

import time
from statistics import median

import mlx.core as mx

# Dense bf16 operations and bytes per second, from the data sheets of the SXM modules.
NOMINAL = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


def nominal_rates():
    """Return operations and bytes per second of this device's data sheet; None if not known."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    name = mx.device_info()["device_name"]
    return next((rates for word, rates in NOMINAL.items() if word in name), None)


def measured_rates(is_toy=False):
    """Return operations per second of one big bf16 product and bytes per second of a copy."""
    size, length = (256, 1 << 16) if is_toy else (8192, 1 << 29)
    left, right = (mx.random.normal((size, size), key=mx.random.key(i)) for i in (1, 2))
    left, right = left.astype(mx.bfloat16), right.astype(mx.bfloat16)
    product_s = seconds_of(lambda: left @ right)
    source = mx.ones(length, dtype=mx.bfloat16)
    copy_s = seconds_of(lambda: source + source)
    return 2 * size**3 / product_s, 4 * length / copy_s


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
