"""Which device computes: asked here, and nowhere else."""

import mlx.core as mx


def is_cpu() -> bool:
    """Whether the processor computes, which is the host itself."""
    return mx.default_device() == mx.Device(mx.cpu)


def is_gpu() -> bool:
    """Whether a GPU computes: Apple's by Metal, or NVIDIA's by CUDA."""
    return mx.default_device() == mx.Device(mx.gpu)


def is_metal() -> bool:
    """Whether an Apple GPU computes."""
    return is_gpu() and mx.metal.is_available()


def is_cuda() -> bool:
    """Whether an NVIDIA GPU computes."""
    return is_gpu() and mx.cuda.is_available()
