"""What the kernels of `numerics.joined` stand for, by MLX's own operations."""

import mlx.core as mx
from mlx_lm.models import activations

from dspark_batch.numerics.exponential import swiglu


def split_heads(joined, shape, offsets, width, *, norms=None, periods=None, into=None, start=0):
    batch, dim = offsets.shape[0], shape.dim
    heads = joined[: batch * width].reshape(batch, width, -1, dim)
    ends = [shape.heads, shape.heads + shape.kv_heads]
    parts = mx.split(heads, ends, axis=2)
    for i in range(2):
        if norms:
            parts[i] = mx.fast.rms_norm(parts[i], norms[i], shape.epsilon)
    queries, keys, values = (part.transpose(0, 2, 1, 3) for part in parts)
    turn = {"traditional": False, "base": shape.base, "scale": shape.scale, "offset": offsets}
    queries, keys = (
        mx.fast.rope(each, shape.turned, freqs=periods, **turn) for each in (queries, keys)
    )
    if into is None:
        return queries, keys, values
    index = (offsets[:, None] + mx.arange(width) - start)[:, None, :, None]
    assert mx.all((index >= 0) & (index < into[0].shape[2])), "MLX would write anywhere"
    put = [
        mx.put_along_axis(a, index, b, axis=2) for a, b in zip(into, (keys, values), strict=True)
    ]
    return queries, *(mx.depends(put, [queries]) if shape.heads else put)


def gated(joined, total, rows, *, is_wide=False, parts=1):
    gates, ups = mx.split(joined[:total], 2, axis=-1)
    silu = swiglu if is_wide else activations.swiglu
    made = mx.take(silu(gates, ups), mx.arange(rows) % total, axis=0)
    return made if parts == 1 else mx.stack(mx.split(made, parts, axis=-1))


def add_and_normalise(left, right, weight, epsilon, total, rows):
    added = right if right.ndim == 2 else right[0] + right[1]
    sums = left[:total] + added[:total]
    normalised = mx.fast.rms_norm(sums, weight, epsilon)
    return sums, mx.take(normalised, mx.arange(rows) % total, axis=0)


def insert_slots(into, others, chosen, slots):
    capacity = into[0].shape[2]
    found = []
    for mine, theirs in zip(into, others, strict=True):
        rows = theirs[chosen][:, :, :capacity]
        rows = mx.pad(rows, [(0, 0), (0, 0), (0, capacity - rows.shape[2]), (0, 0)])
        index = mx.broadcast_to(slots.reshape(-1, 1, 1, 1), rows.shape)
        found.append(mx.put_along_axis(mine, index, rows, axis=0))
    return tuple(found)
