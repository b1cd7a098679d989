"""Attention of a step over a ragged cache."""

import hashlib
from functools import cache, partial, reduce
from importlib.resources import files
from itertools import pairwise
from typing import TypeAlias

import mlx.core as mx

from dspark_batch import device
from dspark_batch.numerics.cuda_kernels import CudaKernel
from dspark_batch.numerics.exponential import exp
from dspark_batch.numerics.rows import Product, over_safe_batches, over_safe_heads

# Positions that are attended to together; every buffer holds whole blocks. On a CPU every visible
# position costs an exponential, the slowest thing there is; a GPU compiles for each capacity.
BLOCK = 64 if device.is_cpu() else 256

_MOST_SCORES = 1 << 24  # that products have in memory at a time, in several copies

_KERNEL_DIMS = (64, 128, 256)  # of heads
_ROWS = 16  # of a warp
_MOST_WARPS = 4  # that share a tile of keys
_MOST_IN_REGISTERS = 128  # of heads; of larger ones the kernel keeps a row's sums in memory
_PIECE = 256  # positions whose sums begin anew
_FEW_BLOCKS = 128  # of threads, which leave a GPU idle
_JOINING_THREADS = 128  # of a block
_BESIDE_SUMS = 8  # floats that the kernel keeps of a row beside its sums, as it says


Beginning: TypeAlias = tuple[mx.array, mx.array]  # keys [KV, P, D] and values [KV, P, D']


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
    beginning: Beginning | None = None,
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
        beginning: keys and values of the first positions, whole blocks, which all slots have in
            common; `keys` and `values` then are those behind it. It changes no bit. None: no such.

    Returns:
        [B, H, W, D'].
    """
    if sinks is not None or softcap is not None or not _has_kernel(queries, values):
        where = (keys, values, scale, mask)
        return products_attention(
            queries,
            *where,
            is_causal=is_causal,
            sinks=sinks,
            softcap=softcap,
            beginning=beginning,
        )
    return attention_by_kernel(queries, keys, values, scale, mask, lengths, beginning=beginning)


def attention_by_kernel(  # noqa: PLR0913  what attention is over
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array,
    lengths: mx.array,
    *,
    beginning: Beginning | None = None,
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
        lengths: and
        beginning: as `ragged_attention` has them.
        splits: of the positions; None: as many as there are pieces, where else few blocks of
            threads would have all the work, as in a step of few tokens of few slots.
    """
    batch, heads, width, dim = queries.shape
    kv_heads, start = keys.shape[1], beginning[0].shape[1] if beginning else 0
    rows, pieces = heads // kv_heads * width, -(-(start + keys.shape[2]) // _PIECE)
    num_warps = -(-rows // _ROWS)
    warps = min(_MOST_WARPS, num_warps)
    groups = -(-num_warps // warps)
    if splits is None:
        splits = pieces if groups == 1 and batch * kv_heads <= _FEW_BLOCKS else 1
    leaves_parts = splits > 1 or (pieces > 1 and dim > _MOST_IN_REGISTERS)
    parts = (batch, kv_heads, pieces if splits > 1 else 1, rows, dim + _BESIDE_SUMS)
    attended = (batch, width, heads, dim)
    threads = 32 * warps
    where = [queries, keys, values, _packed(mask), lengths]
    if beginning is not None and splits == 1 and num_warps < _MOST_WARPS:
        call, first = "go_on", [_begun(where, scale, beginning)]
    else:
        call, first = "attend", [*(beginning or (keys, values))]
    found, sums = _kernel(call)(
        inputs=[*where, *first],
        numbers={"scale": scale, "start": start},
        template=[("D", dim)],
        grid=(threads * batch, kv_heads, groups * splits),
        threadgroup=(threads, 1, 1),
        output_shapes=[attended if splits == 1 else (1,), parts if leaves_parts else (1,)],
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


def _packed(mask: mx.array) -> mx.array:
    """Pack bool [..., C] into words [..., C / 32], uint32, the first one in the lowest bit.

    A compiled pass packs the mask of all layers once.
    """
    return (mask.reshape(*mask.shape[:-1], -1, 32) * _powers()).sum(axis=-1)


@cache
def _powers() -> mx.array:
    return mx.array([1 << bit for bit in range(32)], dtype=mx.uint32)


def _begun(where: list[mx.array], scale: float, beginning: Beginning) -> mx.array:
    """Attend to a beginning, whose tiles are fetched once for rows of several slots.

    For steps of a few tokens: the rows of a wide one fill blocks of threads by themselves.

    Returns:
        What is left for the slots to go on from, [S, KV, n, R, D + 8]: of all pieces, joined, or of
        each one, where few blocks of threads would have all the work.
    """
    (batch, heads, width, dim), (kv_heads, start, _) = where[0].shape, beginning[0].shape
    rows = heads // kv_heads * width
    num_warps = -(-batch * rows // _ROWS)
    warps = min(_MOST_WARPS, num_warps)
    groups = -(-num_warps // warps)
    are_few = groups * kv_heads <= _FEW_BLOCKS and dim <= _MOST_IN_REGISTERS
    splits = start // _PIECE if are_few else 1
    (begun,) = _kernel("begin")(
        inputs=[*where, *beginning],
        numbers={"scale": scale, "start": start},
        template=[("D", dim)],
        grid=(32 * warps, kv_heads, groups * splits),
        threadgroup=(32 * warps, 1, 1),
        output_shapes=[(batch, kv_heads, splits, rows, dim + _BESIDE_SUMS)],
        output_dtypes=[mx.float32],
    )
    return begun


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
    beginning: Beginning | None = None,
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
    capacity = mask.shape[3]
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
        own = end - capacity + keys.shape[2]
        there = keys[:, :, :own], values[:, :, :own]
        attended.append(_products(some, *there, scale, seen, sinks, softcap, beginning))
    return attended[0] if len(attended) == 1 else mx.concatenate(attended, axis=2)


def _products(  # noqa: PLR0913  what attention is over
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array,
    sinks: mx.array | None,
    softcap: float | None,
    beginning: Beginning | None,
) -> mx.array:
    batch, heads, width, dim = queries.shape
    kv_heads, start = keys.shape[1], mask.shape[3] - keys.shape[2]
    rows = (queries * scale).reshape(batch, kv_heads, -1, width, dim)
    seen = mask.reshape(batch, 1, 1, -1, mask.shape[3])
    own = _scores(rows, keys, seen[..., start:], softcap)
    highest = own.max(axis=2).max(axis=-1)  # both at once: slower
    if beginning is not None:  # the rows of all slots are those of one product
        shared = _scores(_together(rows), beginning[0][None], _together(seen[..., :start]), softcap)
        highest = mx.maximum(highest, _apart(shared.max(axis=2).max(axis=-1)))
    if sinks is not None:
        sinks = sinks.astype(mx.float32).reshape(1, kv_heads, -1, 1)
        highest = mx.maximum(highest, sinks)
    sums = _sums(exp(own - highest[:, :, None, ..., None]), values)
    if beginning is not None:
        weights = exp(shared - _together(highest)[:, :, None, ..., None])
        # In front of a slot's own blocks: they are added in order, so there it is one block.
        first = [_apart(_added(each)) for each in _sums(weights, beginning[1][None])]
        pairs = zip(first, sums, strict=True)
        sums = [mx.concatenate([one[:, :, None], own], axis=2) for one, own in pairs]
    total, attended = map(_added, sums)
    if sinks is not None:
        total = total + exp(sinks - highest)
    attended = (attended / total[..., None]).reshape(batch, heads, width, -1)
    return attended.astype(queries.dtype)


def _together(rows: mx.array) -> mx.array:
    """Turn what slots have, [S, KV, ...], into what one slot has for all, [1, KV, S, ...]."""
    return rows.swapaxes(0, 1)[None]


def _apart(rows: mx.array) -> mx.array:
    """Undo `_together`."""
    return rows[0].swapaxes(0, 1)


def _scores(rows: mx.array, keys: mx.array, seen: mx.array, softcap: float | None) -> mx.array:
    """Score blocks of positions, [B, KV, blocks, R..., BLOCK], of rows [B, KV, R..., D].

    Args:
        rows: scaled.
        keys: [B, KV, C, D].
        seen: [B, KV, R..., C], or what broadcasts to it.
        softcap: as `ragged_attention` has it.
    """
    product = Product(_name(rows), rows.shape[-1], BLOCK, is_attention=True)
    weights, flat = _blocks(keys), rows.reshape(*rows.shape[:2], 1, -1, rows.shape[-1])
    scores = over_safe_heads(product, flat, partial(over_safe_batches, product, weights=weights))
    scores = scores.reshape(*scores.shape[:3], *rows.shape[2:-1], BLOCK).astype(mx.float32)
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    seen = mx.moveaxis(seen.reshape(*seen.shape[:-1], -1, BLOCK), -2, 2)
    # One bound for all heads: a CPU has no vectors for the choice, and has them for the minimum.
    return mx.minimum(scores, mx.where(seen, mx.inf, mx.finfo(mx.float32).min))


def _sums(weights: mx.array, values: mx.array) -> list[mx.array]:
    """Sum weights and what they weigh, block by block.

    Args:
        weights: [B, KV, blocks, R..., BLOCK].
        values: [B, KV, C, D'].

    Returns:
        [B, KV, blocks, R...] and [B, KV, blocks, R..., D'].
    """
    product = Product(_name(values), BLOCK, values.shape[-1], False, is_attention=True)
    rows = weights.astype(values.dtype).reshape(*weights.shape[:3], -1, BLOCK)
    multiply = partial(over_safe_batches, product, weights=_blocks(values))
    sums = over_safe_heads(product, rows, multiply).astype(mx.float32)
    return [weights.sum(axis=-1), sums.reshape(*weights.shape[:-1], -1)]


def _added(blocks: mx.array) -> mx.array:
    """Add [B, KV, blocks, ...] up, one behind the other.

    A CPU's sum does so. CUDA's has another order for few numbers of a block than for many.
    """
    if device.is_cpu():
        return blocks.sum(axis=2)
    return reduce(mx.add, (blocks[:, :, at] for at in range(blocks.shape[2])))


def _blocks(positions: mx.array) -> mx.array:
    """Cut [B, KV, C, D] into [B, KV, blocks, 1, BLOCK, D]."""
    batch, heads, _, dim = positions.shape
    return positions.reshape(batch, heads, -1, 1, BLOCK, dim)


def _name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def has_beginnings() -> bool:
    """Whether attention here reads a beginning of many slots once, and no bit changes.

    Blocks are added one after the other, so those of the beginning may have been added before; and
    our kernel reads them where they are. Nobody has tried it on Metal.
    """
    return device.is_cpu() or device.is_cuda()


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


_ATTENDED = ["queries", "keys", "values", "mask", "lengths"]
_SIZES = (
    "queries_shape[0], queries_shape[1], keys_shape[1], queries_shape[2], mask_shape[2], "
    "start + keys_shape[2]"
)
_CALLS = {
    "attend": (
        [*_ATTENDED, "first_keys", "first_values"],
        ["attended", "parts"],
        {"scale": "float", "start": "int"},
        "ragged_attention<D, false>(queries, keys, values, first_keys, first_values, mask, "
        f"lengths, scale, nullptr, attended, parts, {_SIZES}, start, 0);",
    ),
    "begin": (
        [*_ATTENDED, "first_keys", "first_values"],
        ["parts"],
        {"scale": "float", "start": "int"},
        "ragged_attention<D, true>(queries, keys, values, first_keys, first_values, mask, "
        f"lengths, scale, nullptr, nullptr, parts, {_SIZES}, start, 0);",
    ),
    "go_on": (
        [*_ATTENDED, "begun"],
        ["attended", "parts"],
        {"scale": "float", "start": "int"},
        "ragged_attention<D, false>(queries, keys, values, nullptr, nullptr, mask, lengths, "
        f"scale, begun, attended, parts, {_SIZES}, start, begun_shape[2]);",
    ),
    "join": (
        ["parts", "lengths", "queries"],
        ["attended"],
        {},
        "join_pieces<D>(parts, lengths, attended, parts_shape[0], parts_shape[1], parts_shape[2], "
        "parts_shape[3], queries_shape[2]);",
    ),
}


@cache
def _kernel(part: str) -> CudaKernel:
    inputs, outputs, numbers, call = _CALLS[part]
    name = f"{kernel_name()}_{part}"
    return CudaKernel(name, inputs, outputs, header=_source(), source=call, numbers=numbers)
