"""Attention of a step over a ragged cache."""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from itertools import pairwise
from typing import Any

import mlx.core as mx

from dspark_batch import device
from dspark_batch.numerics.exponential import exp
from dspark_batch.numerics.rows import Product, over_safe_batches, over_safe_heads

# Positions that are attended to together; every buffer holds whole blocks. On a CPU every visible
# position costs an exponential, the slowest thing there is; a GPU compiles for each capacity.
BLOCK = 64 if device.is_cpu() else 256

_MOST_SCORES = 1 << 24  # that products have in memory at a time, in several copies

_KERNEL_DIMS = (64, 128, 256)  # of heads
_ROWS = 16  # of a warp
_MOST_WARPS = 4  # that share a tile of keys
_PIECE = 256  # positions whose sums begin anew
_FEW_BLOCKS = 128  # of threads, which leave a GPU idle
_JOINING_THREADS = 128  # of a block
_BESIDE_SUMS = 8  # floats that the kernel keeps of a row beside its sums, as it says


def ragged_attention(  # noqa: PLR0913  what attention is over
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array,
    lengths: mx.array,
    *,
    is_causal: bool = False,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Attend with the query heads of a key head as rows of one product.

    On CUDA our kernel reads each cached position once, and none behind a slot's end. Elsewhere the
    products are MLX's, over whole buffers. Either way the bits of a slot depend on that slot only.

    Args:
        queries: [B, H, W, D].
        keys: [B, KV, C, D]; H is a multiple of KV, and C of `BLOCK`.
        values: [B, KV, C, D'].
        scale: of the scores.
        mask: bool, [B, 1, W, C] or [B, 1, 1, C]; True means visible, and something is to everyone.
        lengths: [B] int32, positions before the step; none from lengths + W on is visible.
        is_causal: no token sees those behind it; what only these may see is not computed.
        sinks: [H], scores of a position without a value that every query sees; None: no such one.
        softcap: bounds the scores s, as softcap * tanh(s / softcap); None: they are not bounded.

    Returns:
        [B, H, W, D'].
    """
    if sinks is not None or softcap is not None or not _has_kernel(queries, values):
        return products_attention(
            queries, keys, values, scale, mask, is_causal=is_causal, sinks=sinks, softcap=softcap
        )
    return attention_by_kernel(queries, keys, values, scale, mask, lengths)


def attention_by_kernel(  # noqa: PLR0913  what attention is over
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array,
    lengths: mx.array,
    *,
    splits: int | None = None,
) -> mx.array:
    """Attend as `ragged_attention` does, by the CUDA kernel.

    The sums of a row begin anew with each piece of so many positions, and pieces are joined in
    order, by one block of threads or behind several: how many splits there are changes no bit.

    Args:
        queries: bfloat16, as keys and values are.
        keys: and
        values: and
        scale: and
        mask: and
        lengths: as `ragged_attention` has them.
        splits: of the positions; None: as many as there are pieces, where else few blocks of
            threads would have all the work, as in a step of few tokens of few slots.
    """
    batch, heads, width, dim = queries.shape
    kv_heads, capacity = keys.shape[1:3]
    rows, pieces = heads // kv_heads * width, -(-capacity // _PIECE)
    num_warps = -(-rows // _ROWS)
    warps = min(_MOST_WARPS, num_warps)
    groups = -(-num_warps // warps)
    if splits is None:
        splits = pieces if groups == 1 and batch * kv_heads <= _FEW_BLOCKS else 1
    parts = (batch, kv_heads, pieces if splits > 1 else 1, rows, dim + _BESIDE_SUMS)
    attended = (batch, width, heads, dim)
    threads = 32 * warps
    found, sums = _kernel("attend")(
        inputs=[queries, keys, values, mask, lengths, mx.array(scale)],
        template=[("D", dim)],
        grid=(threads * batch, kv_heads, groups * splits),
        threadgroup=(threads, 1, 1),
        output_shapes=[attended if splits == 1 else (1,), parts if pieces * splits > 1 else (1,)],
        output_dtypes=[queries.dtype, mx.float32],
    )
    if splits > 1:
        (found,) = _kernel("join")(
            inputs=[sums, lengths, queries],
            template=[("D", dim)],
            grid=(batch * kv_heads * rows * dim // 2, 1, 1),
            threadgroup=(_JOINING_THREADS, 1, 1),
            output_shapes=[attended],
            output_dtypes=[queries.dtype],
        )
    return found.transpose(0, 2, 1, 3)


def products_attention(  # noqa: PLR0913  what attention is over
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array,
    *,
    is_causal: bool = False,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Attend as `ragged_attention` does, by products over blocks of positions of a fixed size.

    The room behind a slot's end changes no bit: a library sums long products in parts whose size
    depends on their length, so every product here is one block long, and the blocks are added in
    order. Neither does the number of query rows, nor that of the slots; see `numerics.rows`. So
    tokens with too many scores for the memory run some at a time. So do those of a long causal
    step, as no positions are computed that are behind all of them: wherever the step begins, it
    fits into the buffer, so that a token sees none of as many positions at the buffer's end as
    there are tokens behind it.
    """
    batch, heads, width, _ = queries.shape
    capacity = keys.shape[2]
    most = max(1, _MOST_SCORES // (batch * heads * capacity))
    if is_causal:
        most = min(most, BLOCK)
    attended: list[mx.array] = []
    for start, stop in pairwise([*range(width, 0, -most), 0][::-1]):
        end = -(-(capacity - width + stop) // BLOCK) * BLOCK if is_causal else capacity
        some, seen = queries[:, :, start:stop], mask[..., :end]
        if mask.shape[2] > 1:
            seen = seen[:, :, start:stop]
        if attended:  # else MLX begins with all of them
            (some,) = mx.depends([some], attended[-1:])
        before = keys[:, :, :end], values[:, :, :end]
        attended.append(_products(some, *before, scale, seen, sinks, softcap))
    return attended[0] if len(attended) == 1 else mx.concatenate(attended, axis=2)


def _products(  # noqa: PLR0913  what attention is over
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array,
    sinks: mx.array | None,
    softcap: float | None,
) -> mx.array:
    batch, heads, width, dim = queries.shape
    kv_heads, positions = keys.shape[1:3]
    key_blocks, value_blocks = (
        each.reshape(batch, kv_heads, -1, 1, BLOCK, each.shape[-1]) for each in (keys, values)
    )
    to_scores = Product(_name(queries), dim, BLOCK, is_attention=True)
    rows = (queries * scale).reshape(batch, kv_heads, 1, -1, dim)
    scores = over_safe_heads(
        to_scores, rows, partial(over_safe_batches, to_scores, weights=key_blocks)
    )
    scores = scores.reshape(batch, kv_heads, -1, heads // kv_heads, width, BLOCK)
    visible = mask.reshape(batch, 1, -1, positions // BLOCK, BLOCK).swapaxes(2, 3)
    scores = scores.astype(mx.float32)
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    # One bound for all heads: a CPU has no vectors for the choice, and has them for the minimum.
    bound = mx.where(visible[:, :, :, None], mx.inf, mx.finfo(mx.float32).min)
    scores = mx.minimum(scores, bound)
    highest = scores.max(axis=2, keepdims=True).max(axis=5, keepdims=True)  # both at once: slower
    if sinks is not None:
        sinks = sinks.astype(mx.float32).reshape(1, kv_heads, 1, -1, 1, 1)
        highest = mx.maximum(highest, sinks)
    weights = exp(scores - highest)
    total = weights.sum(axis=5).sum(axis=2)
    if sinks is not None:
        total = total + exp(sinks - highest)[:, :, 0, :, :, 0]
    total = total.reshape(batch, heads, width, 1)
    weights = weights.astype(values.dtype).reshape(*weights.shape[:3], -1, BLOCK)
    to_values = Product(_name(values), BLOCK, values.shape[-1], False, is_attention=True)
    attended = over_safe_heads(
        to_values, weights, partial(over_safe_batches, to_values, weights=value_blocks)
    )
    attended = attended.astype(mx.float32).sum(axis=2).reshape(batch, heads, width, -1)
    return (attended / total).astype(queries.dtype)


def _name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def kernel_name() -> str:
    """Name the CUDA kernel by its source; what was measured or compiled with another is no use."""
    return f"ragged_attention_{hashlib.sha256(_source().encode()).hexdigest()[:16]}"


def _has_kernel(queries: mx.array, values: mx.array) -> bool:
    dim = queries.shape[-1]
    fits = queries.dtype == mx.bfloat16 and dim in _KERNEL_DIMS and values.shape[-1] == dim
    return fits and device.is_gpu() and _has_tensor_cores()


@cache
def _has_tensor_cores() -> bool:
    """Whether the GPU is one of CUDA's that multiply bfloat16."""
    return mx.cuda.is_available() and int(mx.device_info()["compute_capability_major"]) >= 8


@cache
def _source() -> str:
    source = (files(__package__) / "ragged_attention.cu").read_text()
    return f"constexpr int PIECE = {_PIECE};\n{source}"


_CALLS = {
    "attend": (
        ["queries", "keys", "values", "mask", "lengths", "scale"],
        ["attended", "parts"],
        "ragged_attention<D>(queries, keys, values, mask, lengths, scale[0], attended, parts, "
        "queries_shape[1], keys_shape[1], queries_shape[2], mask_shape[2], keys_shape[2]);",
    ),
    "join": (
        ["parts", "lengths", "queries"],
        ["attended"],
        "join_pieces<D>(parts, lengths, attended, parts_shape[0], parts_shape[1], parts_shape[2], "
        "parts_shape[3], queries_shape[2]);",
    ),
}


@cache
def _kernel(part: str) -> Callable[..., list[mx.array]]:
    inputs, outputs, call = _CALLS[part]
    kernel: Any = mx.fast.cuda_kernel(  # its stub says no more than `object`
        name=f"{kernel_name()}_{part}",
        input_names=inputs,
        output_names=outputs,
        header=_source(),
        source=call,
    )
    made: Callable[..., list[mx.array]] = kernel
    return made
