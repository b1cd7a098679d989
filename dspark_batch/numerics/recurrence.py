"""Recurrences of layers, token by token, so that the width of a step changes no bit."""

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_kernel, gated_delta_ops

from dspark_batch import device


def gated_delta(
    inputs: list[mx.array], state: mx.array | None, mask: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule, as mlx-lm does it where nothing is padded.

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
    if not device.is_metal() or keys.shape[-1] % 32:
        return gated_delta_ops(queries, keys, values, decay, strength, state, mask)
    if mask is None:  # one kernel for all steps: others may round otherwise
        mask = mx.ones(keys.shape[:2], dtype=mx.bool_)
    return gated_delta_kernel(queries, keys, values, decay, strength, state, mask)


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
