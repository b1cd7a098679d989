"""Recurrences of layers, token by token, so that the width of a step changes no bit."""

import hashlib
from functools import cache
from importlib.resources import files

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_kernel, gated_delta_ops

from dspark_batch import device
from dspark_batch.numerics.cuda_kernels import CudaKernel

_KERNEL_ROWS, _THREADS = 32, 128  # of a block
_MOST_KERNEL_DIMS = 256  # of a key, so that a row fits into four threads' registers


def gated_delta(
    inputs: list[mx.array], state: mx.array | None, mask: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule, one token after the other.

    On CUDA one kernel reads and writes a state once, however many tokens there are; on Metal it is
    mlx-lm's kernel, elsewhere its loop of operations.

    Args:
        inputs: queries and keys [S, W, Hk, Dk], normalised and scaled; values [S, W, Hv, Dv]; decay
            g and strength beta [S, W, Hv]. Hv is a multiple of Hk.
        state: [S, Hv, Dv, Dk] float32; None: zeros.
        mask: [S, W] bool, which tokens change the state; None: all.

    Returns:
        Outputs [S, W, Hv, Dv]; what those of masked tokens hold means nothing. The state behind.

    Source:
        Yang et al. 2024 (arXiv:2412.06464), eq. 10, the state transposed.
    """
    queries, keys, values, decay, strength = inputs
    if state is None:
        shape = (*values.shape[:1], *values.shape[2:], keys.shape[-1])
        state = mx.zeros(shape, dtype=mx.float32)
    whole = queries, keys, values, decay, strength, state
    if not (_has_kernel(keys) or (device.is_metal() and keys.shape[-1] % 32 == 0)):
        return gated_delta_ops(*whole, mask)
    if mask is None:  # one kernel for all steps: others may round otherwise
        mask = mx.ones(keys.shape[:2], dtype=mx.bool_)
    run = gated_delta_kernel if device.is_metal() else _by_kernel
    return run(*whole, mask)


def state_space(
    inputs: list[mx.array], state: mx.array | None, mask: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Run a selective state space, one token after the other.

    mlx-lm computes a step of several tokens as attention, whose bits depend on where it is cut.

    Args:
        inputs: readers and writers [S, W, G, N]; what is written [S, W, H, D], times its step; and
            the decay of the step [S, W, H]. H is a multiple of G.
        state: [S, H, D, N] float32; None: zeros.
        mask: [S, W] bool, which tokens change the state; None: all.

    Returns:
        Outputs [S, W, H, D] float32, without the input's own part; and the state behind.

    Source:
        Dao and Gu 2024 (arXiv:2405.21060), eq. 1 with scalar decay.
    """
    readers, writers, written, decay = inputs
    repeats = written.shape[2] // readers.shape[2]
    readers, writers = (mx.repeat(a, repeats, axis=2) for a in (readers, writers))
    if state is None:
        state = mx.zeros((*written.shape[:1], *written.shape[2:], readers.shape[-1]))
    outputs = []
    for token in range(written.shape[1]):
        happens = None if mask is None else mask[:, token]
        each = (readers[:, token], writers[:, token], written[:, token], decay[:, token])
        output, state = _state_space_step(*each, state, happens)
        outputs.append(output)
    return mx.stack(outputs, axis=1), state


def _has_kernel(keys: mx.array) -> bool:
    return device.is_cuda() and keys.shape[-1] % 16 == 0 and keys.shape[-1] <= _MOST_KERNEL_DIMS


def _by_kernel(  # noqa: PLR0913  the terms of the recurrence
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    decay: mx.array,
    strength: mx.array,
    state: mx.array,
    mask: mx.array,
) -> tuple[mx.array, mx.array]:
    slots, _, heads, rows = values.shape
    outputs, after = _kernel()(
        inputs=[queries, keys, values, decay, strength, state, mask],
        template=[("T", keys.dtype), ("B", strength.dtype), ("D", keys.shape[-1])],
        grid=(_THREADS * slots, heads, -(-rows // _KERNEL_ROWS)),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[values.shape, state.shape],
        output_dtypes=[values.dtype, mx.float32],
    )
    return outputs, after


@cache
def _kernel() -> CudaKernel:
    source = (files(__package__) / "gated_delta.cu").read_text()
    return CudaKernel(
        f"gated_delta_{hashlib.sha256(source.encode()).hexdigest()[:16]}",
        ["queries", "keys", "values", "decay", "strength", "before", "mask"],
        ["outputs", "after"],
        header=source,
        source=(
            "gated_delta<T, B, D>(queries, keys, values, decay, strength, before, mask, outputs, "
            "after, keys_shape[1], keys_shape[2], values_shape[2], values_shape[3]);"
        ),
    )


@mx.compile
def _state_space_step(
    reader: mx.array,
    writer: mx.array,
    written: mx.array,
    decay: mx.array,
    state: mx.array,
    happens: mx.array | None,
) -> tuple[mx.array, mx.array]:
    after = state * decay[..., None, None] + written[..., None] * writer[..., None, :]
    output = (after * reader[..., None, :]).sum(axis=-1)
    if happens is not None:
        after = mx.where(happens[:, None, None, None], after, state)
    return output, after
