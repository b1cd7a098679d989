"""What lies between the products of a decoder layer, in one kernel each on CUDA.

MLX launches a kernel for every norm, rotation, activation and sum, and a round of many slots waits
for its host. Each function here is one launch, and gives the bits of the operations that it says:
that is found out on the device, by whoever uses it, before it is used.
"""

import hashlib
import math
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import mlx.core as mx

from dspark_batch.numerics.cuda_kernels import CudaKernel

_RUN = 8  # numbers that a thread has at a time
_THREADS = 256  # of a block
_HEAD_DIMS = (64, 128, 256)
_MOST_CHUNKS = 8  # of a row that is normalised, for each thread
_MOST_NORMALISED = 128 * _MOST_CHUNKS * _RUN


class Heads(NamedTuple):
    """How queries, keys and values lie in a joined product, and what becomes of them."""

    heads: int
    kv_heads: int
    dim: int  # of a head
    turned: int  # how much of a head is rotated
    base: float | None  # of the rotation; None: its periods are listed
    scale: float = 1.0  # of positions
    epsilon: float = 0.0  # of the norms


def fits_heads(shape: Heads) -> bool:
    """Whether `split_heads` can do it."""
    return (
        shape.dim in _HEAD_DIMS and 0 < shape.turned <= shape.dim and shape.turned % (2 * _RUN) == 0
    )


def fits_gate(size: int, parts: int = 1) -> bool:
    """Whether `gated` can do it: whole runs of numbers in each part of a row."""
    return size % (parts * _RUN) == 0


def fits_norm(size: int) -> bool:
    """Whether `add_and_normalise` can do it: rows that MLX's small kernel normalises."""
    return size % _RUN == 0 and size <= _MOST_NORMALISED


def split_heads(  # noqa: PLR0913  all that a head is made of
    joined: mx.array,
    shape: Heads,
    offsets: mx.array,
    width: int,
    *,
    norms: tuple[mx.array, mx.array] | None = None,
    periods: mx.array | None = None,
    into: tuple[mx.array, mx.array] | None = None,
    start: int = 0,
) -> tuple[mx.array, mx.array, mx.array]:
    """Make rotated queries and keys, and values, of a joined product of each token.

    Args:
        joined: bfloat16 [R, (H + 2 KV) D], R >= B * T: queries, keys, values. More rows are not
            read.
        shape: see there.
        offsets: [B] int32, the position of each slot's first token.
        width: T.
        norms: [D] each, weights of RMS norms of query and key heads; None: there are none.
        periods: [turned / 2] float32, if there is no base.
        into: keys and values of a cache, [B, KV, C, D] each, row-contiguous: they are written in
            place from the offsets on, though a kernel in flight may read what lies in front of
            these. Whoever holds them sees it. MLX must launch kernels one by one for that; in a
            graph of kernels it would not see that one writes. None: others are made.
        start: the position of the first one in that cache.

    Returns:
        Queries [B, H, T, D], or anything if there are no such heads; keys and values,
        [B, KV, T, D] each, or the whole of those given.
    """
    batch = offsets.shape[0]
    weights = norms or (joined, joined)  # not read
    kernel = _kernel("heads_into_cache" if into else "heads")
    lane_groups = _THREADS // (shape.dim // _RUN)
    threads = _THREADS if shape.heads + 2 * shape.kv_heads >= lane_groups else 128
    own = (batch, shape.kv_heads, width, shape.dim)
    of_queries = (batch, shape.heads, width, shape.dim) if shape.heads else (1,)
    outputs = [of_queries] if into else [of_queries, own, own]
    made = kernel(
        inputs=[
            joined,
            *weights,
            offsets if periods is None else periods,  # the former is not read
            offsets,
            *(into or ()),
        ],
        numbers={
            "epsilon": shape.epsilon,
            "scale": shape.scale,
            "log2_base": math.log2(shape.base or 1.0),
            "width": width,
            "start": start,
        },
        template=[
            ("D", shape.dim),
            ("TURNED", shape.turned),
            ("HEADS", shape.heads),
            ("KV_HEADS", shape.kv_heads),
            ("HAS_NORMS", norms is not None),
            ("HAS_PERIODS", periods is not None),
        ],
        grid=(batch * width * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=outputs,
        output_dtypes=[joined.dtype] * len(outputs),
    )
    if into is None:
        queries, keys, values = made
        return queries, keys, values
    keys, values = mx.depends(list(into), made)
    return made[0], keys, values


def gated(
    joined: mx.array, total: int, rows: int, *, is_wide: bool = False, parts: int = 1
) -> mx.array:
    """Activate as `silu(gate) * up`.

    Args:
        joined: bfloat16 [M, 2 N], M >= total: gates in front of ups.
        total: rows that there are.
        rows: how many to make; those beyond `total` are copies.
        is_wide: as `numerics.exponential.swiglu` does it; else as mlx-lm does.
        parts: into how many a row is cut.

    Returns:
        [rows, N]; in several parts [parts, rows, N / parts].
    """
    size = joined.shape[-1] // 2
    shape = (rows, size) if parts == 1 else (parts, rows, size // parts)
    (found,) = _kernel("gate")(
        inputs=[joined],
        numbers={"total": total, "made": rows},
        template=[("SIZE", size), ("IS_WIDE", is_wide), ("PARTS", parts)],
        grid=(rows * size // _RUN, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[joined.dtype],
    )
    return found


def add_and_normalise(
    left: mx.array, right: mx.array, weight: mx.array, epsilon: float, total: int, rows: int
) -> tuple[mx.array, mx.array]:
    """Add two arrays, and take the RMS norm of the sum.

    Args:
        left: bfloat16 [M, E], M >= total.
        right: the same, or [2, M, E]: two to be added before.
        weight: [E], of the norm.
        epsilon: of the norm.
        total: rows that there are.
        rows: how many normalised ones to make; those beyond `total` are copies.

    Returns:
        Sums [total, E], and normalised ones [rows, E].
    """
    size = left.shape[-1]
    threads = _threads_of(size)
    sums, normalised = _kernel("add")(
        inputs=[left, right, weight],
        numbers={"epsilon": epsilon, "total": total, "others": right.shape[-2]},
        template=[
            ("SIZE", size),
            ("THREADS", threads),
            ("CHUNKS", -(-size // (_RUN * threads))),
            ("PARTS", math.prod(right.shape[:-2])),
        ],
        grid=(rows * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(total, size), (rows, size)],
        output_dtypes=[left.dtype, left.dtype],
    )
    return sums, normalised


def _threads_of(size: int) -> int:
    """Say how many threads MLX's rms_norm has for a row, of which each takes every so many-th run.

    Source:
        MLX, `backend/cuda/rms_norm.cu`; other threads would add in another order.
    """
    runs = size // _RUN
    evenly = (n for n in (128, 64) if runs % n == 0 and runs // n <= _MOST_CHUNKS)
    return 64 if runs <= 64 else next(evenly, 128)


def fits_slots(into: mx.array, values: mx.array) -> bool:
    """Whether `insert_slots` can do it: whole runs of numbers, and as many in keys and values."""
    dim = into.shape[-1]
    return into.dtype == mx.bfloat16 and dim % _RUN == 0 and values.shape[-1] == dim


def insert_slots(
    into: tuple[mx.array, mx.array],
    others: tuple[mx.array, mx.array],
    chosen: mx.array,
    slots: mx.array,
) -> tuple[mx.array, mx.array]:
    """Put keys and values of other slots into slots of a cache, in place, and zeros behind them.

    Args:
        into: keys and values of the cache, bfloat16 [S, KV, C, D] each, as `split_heads` has them:
            kernels in flight may read them.
        others: [O, KV, T, D] each; what of T is behind C is left out.
        chosen: [n] int32, of the others.
        slots: [n] int32, where they go.

    Returns:
        The whole of `into`.
    """
    _, kv_heads, capacity, dim = into[0].shape
    runs = chosen.shape[0] * kv_heads * capacity * dim // _RUN
    made = _kernel("insert")(
        inputs=[*others, chosen, slots, *into],
        numbers={"runs": runs},
        template=[("D", dim)],
        grid=(runs, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.bfloat16],
    )
    keys, values = mx.depends(list(into), made)
    return keys, values


@cache
def _source() -> str:
    return (files(__package__) / "joined.cu").read_text()


def kernel_name() -> str:
    """Name the kernels by their source."""
    return f"joined_{hashlib.sha256(_source().encode()).hexdigest()[:16]}"


_SPLIT = "split_heads<D, TURNED, HAS_NORMS, HAS_PERIODS, {}>(joined, query_weight, key_weight, "
_SPLIT += "reinterpret_cast<const float*>(periods), offsets, epsilon, scale, log2_base, queries, "
_SPLIT += "{}, HEADS, KV_HEADS, width, {}, start);"
_OF_HEADS = ["joined", "query_weight", "key_weight", "periods", "offsets"]
_NUMBERS_OF_HEADS = {"epsilon": "float", "scale": "float", "log2_base": "float"}
_NUMBERS_OF_HEADS |= {"width": "int", "start": "int"}

_CALLS = {  # inputs, outputs, numbers, source
    "heads": (
        _OF_HEADS,
        ["queries", "keys", "values"],
        _NUMBERS_OF_HEADS,
        _SPLIT.format("false", "keys, values", "width"),
    ),
    "heads_into_cache": (
        [*_OF_HEADS, "keys", "values"],
        ["queries"],
        _NUMBERS_OF_HEADS,
        _SPLIT.format(
            "true", "const_cast<Number*>(keys), const_cast<Number*>(values)", "keys_shape[2]"
        ),
    ),
    "gate": (
        ["joined"],
        ["gated"],
        {"total": "int", "made": "int"},
        "gate<IS_WIDE, PARTS>(joined, gated, total, made, SIZE);",
    ),
    "insert": (
        ["other_keys", "other_values", "chosen", "slots", "keys", "values"],
        ["done"],
        {"runs": "int"},
        "insert_slots<D>(other_keys, other_values, chosen, slots, const_cast<Number*>(keys), "
        "const_cast<Number*>(values), done, runs, keys_shape[1], other_keys_shape[2], "
        "keys_shape[2]);",
    ),
    "add": (
        ["left", "right", "weight"],
        ["sums", "normalised_sums"],
        {"epsilon": "float", "total": "int", "others": "int"},
        "add_and_normalise<SIZE, THREADS, CHUNKS, PARTS>(left, right, weight, epsilon, sums, "
        "normalised_sums, total, others);",
    ),
}


@cache
def _kernel(part: str) -> CudaKernel:
    inputs, outputs, numbers, call = _CALLS[part]
    name = f"{kernel_name()}_{part}"
    return CudaKernel(name, inputs, outputs, header=_source(), source=call, numbers=numbers)
