"""Products whose rows have the same bits, however many rows run together.

Example: `x @ W` with 3 rows, and with 48 rows of which 3 are the same. OpenBLAS has another kernel
for few rows, so the 3 rows may differ in their last bits. Padded to 16 rows, they do not.

A count of rows is *safe* for a product of a size if every row, wherever it stands, has the bits
that it has in a product of the reference count. Whether a count is safe is a fact about the machine
and its libraries. It is found by running random matrices of that size, once, when it is asked for.
Nothing is timed.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from dspark_batch import device
from dspark_batch.numerics.strips import Strips

Multiply: TypeAlias = Callable[[mx.array], mx.array]  # [M, K] to [M, N], or with leading axes

_DISTINCT = 256  # rows of a random weight; more are repeated
_LEAST_VALUES = 256  # of one row that are compared, over several trials if the row is short
_TRIALS, _MOST_TRIALS = 2, 16
_PLAIN_ROUND = 64  # rows of a round without drafts, of many slots
# Rows of a product that is large: without strips; with them, where there is no count of 16.
_LARGE, _LARGE_STRIPS = 16, 24


class Product(NamedTuple):
    """A product of a size: `[M, size] @ weight`, for any M."""

    dtype: str  # of the rows
    size: int  # K, of a row
    width: int  # N, of a result
    is_transposed: bool = True  # the weight lies as [N, K]
    has_bias: bool = False
    quantised: tuple[int, int, str] | None = None  # bits, group size, mode; None: it is not
    is_attention: bool = False  # of a slot's queries, say: any number of matrices run in a batch
    matrices: int = 1  # of a batch, each with a weight of its own
    in_strips: bool = False  # of columns; see `numerics.strips`


class Ladder(NamedTuple):
    """Which counts of rows are tried on a kind of device."""

    counts: tuple[int, ...]  # ascending
    references: tuple[int, ...]  # the first one that gives all its rows the same bits
    matrices: tuple[int, ...] = ()  # of a batch, ascending; (): each matrix runs by itself


# With AVX2 kernels the rows of large products differ by their place, so the reference is smaller.
# A single row is never alone: MLX may take it for a column, which other kernels multiply.
_CPU = Ladder((2, 4, 8, 12, *range(16, 272, 16)), (64, 32, 16, 8, 4, 2, 1))
_GPU = Ladder(
    (2, 4, 8, 16, 32, 48, 64, 96, *range(128, 512, 64), *range(512, 2049, 128)),
    (512, 256, 128, 64, 32, 16, 8, 4, 2, 1),
)
# A tile of AVX2 kernels has twelve rows, and a rest of up to three is added in the same order.
# Where the reference would be a single row, strips are not used.
_CPU_STRIPS = Ladder((2, 3, *(12 * n + rest for n in range(1, 23) for rest in (0, 3))), (48, 24, 1))
# Few rows are the rule here, and whatever is more becomes several matrices.
_CPU_ATTENTION = Ladder((1, 2, 4, 8, 16), (16, 8, 4, 2, 1))
_GPU_ATTENTION = Ladder(
    (1, 2, 4, 8, 16, 32, 64),
    (64, 32, 16, 8, 4, 2, 1),
    (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
)
_MATRICES = 128  # of the reference, where matrices run in a batch

Verdicts: TypeAlias = dict[tuple[Product, int], bool]  # product, count -> is it safe?
VERDICTS: Verdicts = {}  # of this process; `tuning.verdicts` keeps them on the disk

# While rows run as they come, in a thread: what is made for that time, by what needs it.
_free: ContextVar[dict[object, mx.array] | None] = ContextVar("free", default=None)
_references: dict[Product, tuple[int, list[bytes]]] = {}  # count, and the bits of its rows
# What is asked for in each layer of each step.
_pieces: dict[tuple[Product, int, Ladder], tuple[int, ...]] = {}
_least: dict[tuple[Product, int, Ladder], int | None] = {}
_in_strips: dict[Product, Product | None] = {}


def over_safe_rows(product: Product, hidden: mx.array, multiply: Multiply) -> mx.array:
    """Multiply rows in pieces of safe counts; those that are missing are filled up.

    Args:
        product: what `multiply` is.
        hidden: [..., K].
        multiply: maps [M, K] to [M, N], each row by itself.

    Returns:
        [..., N], with the bits of the reference count.
    """
    *batch, _ = hidden.shape
    total = math.prod(batch)
    counts = _counts(product, total)
    rows = _filled_up(hidden, total, sum(counts))
    return _multiplied(counts, rows, multiply)[:total].reshape(*batch, -1)


def rows_needed(product: Product, total: int) -> int:
    """Say how many rows a product of so many runs over: those that are missing are filled up."""
    return sum(_counts(product, total))


def over_filled_rows(product: Product, rows: mx.array, total: int, multiply: Multiply) -> mx.array:
    """Multiply as `over_safe_rows` does, `rows_needed` rows [..., R, K] that somebody filled up.

    Returns:
        [..., R, N]; those of the first `total` rows are the result.
    """
    return _multiplied(_counts(product, total), rows, multiply)


def over_safe_heads(product: Product, rows: mx.array, multiply: Multiply) -> mx.array:
    """Multiply many small matrices [..., M, K], as `over_safe_rows` does with one.

    Many rows run as several matrices of the reference count, all in one batch. On a CPU, what is
    left over of them runs as a smaller one, if that is safe.

    Args:
        product: what `multiply` is.
        rows: [..., M, K].
        multiply: maps [..., P, M', K] to [..., P, M', N]; see `over_safe_batches`.

    Returns:
        [..., M, N].
    """
    *batch, total, size = rows.shape
    if are_as_they_come():
        return multiply(rows[..., None, :, :])[..., 0, :, :]
    count = _least_safe(product, total) or _reference(product)[0]
    rest = total % count
    if device.is_cpu() and 0 < rest < total and (_least_safe(product, rest) or count) < count:
        some = rows[..., :-rest, :], rows[..., -rest:, :]
        return mx.concatenate([over_safe_heads(product, e, multiply) for e in some], axis=-2)
    parts = -(-total // count)
    if missing := parts * count - total:
        rows = mx.pad(rows, [(0, 0)] * len(batch) + [(0, missing), (0, 0)])
    results = multiply(rows.reshape(*batch, parts, count, size))
    results = results.reshape(*results.shape[:-3], parts * count, -1)[..., :total, :]
    # With gaps in it, whatever follows on a CPU takes twice as long.
    return mx.contiguous(results) if missing and device.is_cpu() else results


def over_safe_batches(product: Product, rows: mx.array, weights: mx.array) -> mx.array:
    """Multiply the matrices of `over_safe_heads`, where a batch of them may decide bits.

    On CUDA a row has other bits in a batch of other size. So there a batch is cut, and filled up,
    to numbers of matrices that give it those of the reference. A CPU multiplies them one by one.

    Args:
        product: with `is_attention`.
        rows: [..., P, M, K], M a safe count.
        weights: [..., 1, K, N], or [..., 1, N, K] if transposed.

    Returns:
        [..., P, M, N]; leading axes as they broadcast.
    """
    if are_as_they_come() or not _ladder(product).matrices:
        return _matmul(product, rows, weights)
    parts = [
        _in_batches(product, rows[..., at, :, :], weights[..., 0, :, :])
        for at in range(rows.shape[-3])
    ]
    return mx.stack(parts, axis=-3)


@contextmanager
def as_they_come(made: dict[object, mx.array] | None = None) -> Iterator[None]:
    """Run products over as many rows as there are, as mlx-lm does: bits depend on the count.

    Args:
        made: what was made for an earlier time of it, and is for this one; None: nothing.
    """
    outer = _free.get()
    before = _free.set(outer if outer is not None else {} if made is None else made)
    try:
        yield
    finally:
        _free.reset(before)


def are_as_they_come() -> bool:
    """Whether products run over as many rows as there are now."""
    return _free.get() is not None


def while_they_come(owner: object, make: Callable[[], mx.array]) -> mx.array:
    """Make something once for the time in which rows run as they come; then it is let go."""
    made = _free.get()
    if made is None:
        return make()
    if owner not in made:
        made[owner] = make()
    return made[owner]


def pieces(product: Product, count: int) -> tuple[int, ...]:
    """Cut a number of rows into safe counts; the last one may be padded.

    The least safe count that holds all rows is taken, if there is one that is not much too large.
    Else as many of the largest safe count as fit, and one for the rest.
    """
    key = (product, count, _ladder(product))
    if key not in _pieces:
        found: list[int] = []
        while count > 0:
            least = _least_safe(product, count)
            piece = least if least is not None else _largest_safe(product, count)
            found.append(piece)
            count -= piece
        _pieces[key] = tuple(found)
    return _pieces[key]


def in_strips(product: Product) -> Product | None:
    """Say which product gives the same in strips; None: strips are not needed, or do not help.

    They are needed if rows have other bits in other places of every product of 16 rows or more, and
    help if 24 rows have the same ones in strips. Only a CPU has strips.
    """
    if product not in _in_strips:
        strips = product._replace(in_strips=True)
        large = [count for count in _CPU.references if count >= _LARGE]
        helps = (
            device.is_cpu()
            and product.quantised is None
            and not any(is_safe(product, count) for count in large)
            and is_safe(strips, _LARGE_STRIPS)
        )
        _in_strips[product] = strips if helps else None
    return _in_strips[product]


def in_halves(product: Product) -> Product | None:
    """Say which two products give the halves of its sums, if few rows need far fewer so.

    CUDA's libraries add the terms of a long sum in other orders for other counts of rows. So 64
    rows may need 320 rows of a product, and 64 of a batch of two that have half of its terms each.
    """
    halves = product._replace(size=product.size // 2, matrices=2)
    if not device.is_cuda() or are_as_they_come() or product.size % 2:
        return None
    whole, halved = (rows_needed(each, _PLAIN_ROUND) for each in (product, halves))
    return halves if 2 * halved <= whole else None


def is_safe(product: Product, count: int) -> bool:
    """Whether every row of a product of so many rows has the bits of the reference count."""
    product = _of_reference(product) if product.matrices == 1 else product
    key = (product, count)
    if key not in VERDICTS:
        reference, bits = _reference(product)
        is_reference = key == (_of_reference(product), reference)
        VERDICTS[key] = is_reference or _bits(product, count) == bits
    return VERDICTS[key]


def reference_bits(product: Product) -> bytes:
    """Give the bits of the reference's rows, so that another library or processor is noticed."""
    count, bits = _reference(product)
    return b"".join([str(count).encode(), *bits])


def forget() -> None:
    """Forget what this process knows."""
    VERDICTS.clear()
    _references.clear()
    _least.clear()
    _pieces.clear()
    _in_strips.clear()


def _counts(product: Product, total: int) -> tuple[int, ...]:
    return (total,) if are_as_they_come() else pieces(product, total)


def _multiplied(counts: tuple[int, ...], rows: mx.array, multiply: Multiply) -> mx.array:
    """Multiply rows [..., R, K] in pieces of so many; [..., R, N]."""
    if len(counts) == 1:
        return device.begun(multiply(rows))
    parts = mx.split(rows, np.cumsum(counts[:-1]).tolist(), axis=-2)
    return device.begun(mx.concatenate([multiply(part) for part in parts], axis=-2))


def _filled_up(hidden: mx.array, total: int, count: int) -> mx.array:
    """Make `count` rows [count, K] of the `total` ones of hidden [..., K].

    A GPU fills up with copies of all rows. They are made by an elementwise operation, right behind
    what made the rows, so that a compiled pass has one kernel for both: the activation in front of
    a projection then writes the copies itself, and no layer has a kernel more. A CPU computes what
    it fills up with, and does not compile, so there it is as few zeros as there are rows missing.
    """
    size = hidden.shape[-1]
    if device.is_cpu():
        # Rows that lie in memory as columns are multiplied by other kernels.
        rows = mx.contiguous(hidden.reshape(-1, size))
        return mx.pad(rows, [(0, count - total), (0, 0)]) if count > total else rows
    if count == total:
        return hidden.reshape(-1, size)
    copies = mx.broadcast_to(hidden, (-(-count // total), *hidden.shape)) * 1
    return copies.reshape(-1, size)[:count]


def _ladder(product: Product) -> Ladder:
    if device.is_cpu():
        if product.in_strips:
            return _CPU_STRIPS
        return _CPU_ATTENTION if product.is_attention else _CPU
    return _GPU_ATTENTION if product.is_attention else _GPU


def _matmul(product: Product, rows: mx.array, weights: mx.array) -> mx.array:
    return rows @ (weights.swapaxes(-1, -2) if product.is_transposed else weights)


def _in_batches(product: Product, rows: mx.array, weights: mx.array) -> mx.array:
    """Multiply [..., M, K] by [..., K, N], or [..., N, K], in batches of safe numbers."""
    batch = np.broadcast_shapes(rows.shape[:-2], weights.shape[:-2])
    count, total = rows.shape[-2], math.prod(batch)
    rows, weights = (
        mx.contiguous(mx.broadcast_to(each, (*batch, *each.shape[-2:]))).reshape(
            total, *each.shape[-2:]
        )
        for each in (rows, weights)
    )
    results, start = [], 0
    while start < total:
        number = _safe_number(product, count, total - start)
        some = (each[start : start + number] for each in (rows, weights))
        missing = max(0, start + number - total)
        some = (mx.pad(each, [(0, missing), (0, 0), (0, 0)]) if missing else each for each in some)
        results.append(_matmul(product, *some))
        start += number
    return mx.concatenate(results)[:total].reshape(*batch, count, -1)


def _safe_number(product: Product, count: int, total: int) -> int:
    """Say how many matrices of a safe count of rows run in a batch, if so many are left."""
    numbers = _ladder(product).matrices
    most_first = [n for n in reversed(numbers) if n <= total] + [n for n in numbers if n > total]
    return next(n for n in most_first if is_safe(product._replace(matrices=n), count))


def _of_reference(product: Product) -> Product:
    """Say of how many matrices the batch of a product's reference is."""
    return product._replace(matrices=_MATRICES) if _ladder(product).matrices else product


def _least_safe(product: Product, count: int) -> int | None:
    ladder = _ladder(product)
    key = (product, count, ladder)
    if key not in _least:
        most = max(2 * count, ladder.references[0])
        tried = (each for each in ladder.counts if count <= each <= most)
        _least[key] = next((each for each in tried if is_safe(product, each)), None)
    return _least[key]


def _largest_safe(product: Product, count: int) -> int:
    counts = reversed([each for each in _ladder(product).counts if each <= count])
    largest = next((each for each in counts if is_safe(product, each)), None)
    # Every ladder ends with a reference of one row, so this is reached with small counts only.
    return largest if largest is not None else _reference(product)[0]


def _reference(product: Product) -> tuple[int, list[bytes]]:
    product = _of_reference(product)
    if product not in _references:
        for count in _ladder(product).references:
            if (bits := _bits(product, count)) is not None:
                _references[product] = count, bits
                break
    return _references[product]


def _bits(product: Product, count: int) -> list[bytes] | None:
    """Give the bits that a row has in every place of a product; None: they depend on the place."""
    multiply = _sample(product)
    found = []
    trials = min(_MOST_TRIALS, max(_TRIALS, math.ceil(_LEAST_VALUES / product.width)))
    if product.quantised:  # a CPU multiplies these row by row, and slowly
        trials = 1 if device.is_cpu() else _MOST_TRIALS
    for trial in range(trials):
        row = _cancelling((1, product.size), _dtype(product), trial, sign=1)
        rows = mx.broadcast_to(row, (*_batch(product), count, product.size))
        results = multiply(mx.contiguous(rows)).reshape(-1, product.width)
        values = np.array(results.view(mx.uint8))
        if (values != values[0]).any():
            return None
        found.append(values[0].tobytes())
    return found


def _batch(product: Product) -> tuple[int, ...]:
    return (product.matrices,) if product.matrices > 1 else ()


def _sample(product: Product) -> Multiply:
    """Make a product of the size, with a random weight; a batch has copies of it.

    All its terms cancel out, so what remains is the rounding of the sums: the order in which a
    kernel adds shows in every value, also where results are rounded to few bits. What quantising
    leaves over hides a little of it, so there more rows are tried.
    """
    distinct = min(_DISTINCT, product.width)
    shape, dtype = (distinct, product.size), _dtype(product)
    weight = _cancelling(shape, dtype, 101, sign=-1)
    weight = mx.tile(weight, (-(-product.width // distinct), 1))[: product.width]
    if not product.is_transposed:
        weight = weight.T
    weight = mx.contiguous(mx.broadcast_to(weight, (*_batch(product), *weight.shape)))
    bias = mx.zeros(product.width, dtype) if product.has_bias else None  # any other would hide it
    if product.quantised is not None:
        bits, group_size, mode = product.quantised
        settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "mode": mode}
        stored: Any = mx.quantize(weight, **settings)  # weight and scales, and biases for some

        def quantised(rows: mx.array) -> mx.array:
            weight, *scales = stored
            result = mx.quantized_matmul(rows, weight, *scales, **settings)
            return result if bias is None else result + bias

        return quantised
    mx.eval(weight)
    if product.in_strips:
        return Strips(weight).multiply
    if bias is None:
        return lambda rows: _matmul(product, rows, weight)
    return lambda rows: mx.addmm(bias, rows, weight.T)


def _cancelling(shape: tuple[int, int], dtype: mx.Dtype, seed: int, *, sign: int) -> mx.array:
    """Make rows of values that each come twice, the second one with a sign, in mixed places."""
    return mx.array(_drawn(shape, seed, sign)).astype(dtype)


@lru_cache(maxsize=32)  # every count of a product is tried with the same ones
def _drawn(shape: tuple[int, int], seed: int, sign: int) -> np.ndarray:
    """Draw by NumPy, since a GPU would compile kernels for it that nothing else needs."""
    rows, size = shape
    half = np.random.default_rng(seed).standard_normal((rows, size // 2), dtype=np.float32)
    odd = np.zeros((rows, size % 2), np.float32)
    places = np.random.default_rng(size).permutation(size)
    values = np.concatenate([half, sign * half, odd], axis=1)[:, places]
    return np.ascontiguousarray(values)  # else [K, N]: another kernel


def _dtype(product: Product) -> mx.Dtype:
    return getattr(mx, product.dtype)
