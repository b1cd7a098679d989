"""Makes the linear layers of a model multiply over safe rows; see `numerics.rows`."""

from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from dspark_batch.numerics.rows import (
    Multiply,
    Product,
    are_as_they_come,
    in_strips,
    over_safe_heads,
    over_safe_rows,
)
from dspark_batch.numerics.strips import Strips


def make_rows_safe(model: nn.Module) -> None:
    """Give every linear layer of a model the same bits for a row, however many rows there are.

    Each layer keeps its parameters and its place; its class becomes a one-off subclass that
    flattens [S, W, E] to rows. An embedding that is also the head changes in that part only.
    """
    for module in model.modules():
        for kind, safe in _SAFE.items():
            if isinstance(module, kind) and not isinstance(module, safe):
                plain = type(module)
                module.__class__ = type(plain.__name__, (safe, plain), {})
        for is_one, safe in ((_is_router, _SafeRouter), (_has_raw_head, _SafeHead)):
            if is_one(module) and not isinstance(module, safe):
                module.__class__ = type(type(module).__name__, (safe, type(module)), {})


class _SafeLinear(nn.Module):
    """A linear layer, quantised or not."""

    def __call__(self, hidden: mx.array) -> mx.array:
        return _by_rows(self, hidden, super().__call__)


class _SafeEmbedding(nn.Module):
    """An embedding that may be a head, quantised or not."""

    def as_linear(self, hidden: mx.array) -> mx.array:
        as_linear = super().as_linear  # type: ignore[misc]  # of the embedding that it is mixed into
        return _by_rows(self, hidden, as_linear)


class _SafeExperts(nn.Module):
    """The same layer of several experts, quantised or not.

    Sorted by expert, the rows of one would run together, as many as a step happens to have. Here
    each row is a product of its own, always laid out alike.
    """

    def __call__(
        self, hidden: mx.array, experts: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        if are_as_they_come():
            return super().__call__(hidden, experts, sorted_indices=sorted_indices)
        rows = mx.broadcast_to(hidden, (*experts.shape, *hidden.shape[-2:]))
        rows = rows.reshape(-1, *hidden.shape[-2:])
        results = super().__call__(rows, experts.flatten(), sorted_indices=False)
        return results.reshape(*experts.shape, *results.shape[-2:])


class _SafeHeads(nn.Module):
    """A linear layer for each head, quantised or not: [B, H, W, K] to [B, H, W, N]."""

    def __call__(self, hidden: mx.array, transpose: bool = True) -> mx.array:
        batch, heads, width, size = hidden.shape
        multiply = super().__call__
        if not transpose or heads != self.weight.shape[0]:  # cached positions, in mlx-lm's own pass
            return multiply(hidden, transpose=transpose)
        rows = hidden.swapaxes(0, 1).reshape(heads, -1, size)
        product = _product(self, size, rows.dtype)._replace(matrices=heads)

        def over_matrices(rows: mx.array) -> mx.array:
            """Map [H, P, M, K] to [H, P, M, N], a matrix of each head after the other."""
            return mx.stack([multiply(rows[:, at]) for at in range(rows.shape[1])], axis=1)

        results = over_safe_heads(product, rows, over_matrices)
        return results.reshape(heads, batch, width, -1).swapaxes(0, 1)


class _SafeRouter(nn.Module):
    """A router of experts that multiplies by itself: rows to experts and their weights."""

    def __call__(self, hidden: mx.array) -> tuple[mx.array, mx.array]:
        call = super().__call__
        dtypes: list[mx.Dtype] = []

        def chosen(rows: mx.array) -> mx.array:
            experts, weights = call(rows[None])
            dtypes[:] = experts.dtype, weights.dtype
            return mx.concatenate([each[0].astype(mx.float32) for each in (experts, weights)], -1)

        product = _product(self, hidden.shape[-1], hidden.dtype)
        experts, weights = mx.split(over_safe_rows(product, hidden, chosen), 2, axis=-1)
        return experts.astype(dtypes[0]), weights.astype(dtypes[1])


class _SafeHead(nn.Module):
    """A model whose head is its embedding, by whose weight its own code multiplies."""

    def __call__(self, inputs: mx.array, cache: object = None) -> mx.array:
        logits: mx.array = self.model.embed_tokens.as_linear(self.model(inputs, cache))
        return logits


_SAFE = {
    nn.Linear: _SafeLinear,
    nn.QuantizedLinear: _SafeLinear,
    nn.Embedding: _SafeEmbedding,
    nn.QuantizedEmbedding: _SafeEmbedding,
    SwitchLinear: _SafeExperts,
    QuantizedSwitchLinear: _SafeExperts,
    MultiLinear: _SafeHeads,
    QuantizedMultiLinear: _SafeHeads,
}


# Of seed_oss, llama4_text and minicpm: their raw head, the other one, and which of them it is.
_OF_RAW_HEADS = {
    *("model", "embed_tokens", "weight", "T", "tie_word_embeddings"),
    *("lm_head", "output", "args", "hidden_size", "dim_model_base"),
}


def _is_router(module: nn.Module) -> bool:
    """Whether a module of mlx-lm says `x @ self.weight.T` instead of having a linear layer."""
    code = getattr(type(module).__call__, "__code__", None)  # None: not written in Python
    is_matrix = "weight" in module and module.weight.ndim == 2
    return is_matrix and code is not None and {"weight", "T"} <= set(code.co_names)


def _has_raw_head(module: nn.Module) -> bool:
    """Whether a module says `@ self.model.embed_tokens.weight.T` and no more, without a head."""
    names = {*getattr(getattr(type(module).__call__, "__code__", None), "co_names", ())}
    is_raw = {"model", "embed_tokens", "weight", "T"} <= names <= _OF_RAW_HEADS
    return is_raw and "lm_head" not in module and "output" not in module


def _by_rows(layer: nn.Module, hidden: mx.array, multiply: Multiply) -> mx.array:
    product = _product(layer, hidden.shape[-1], hidden.dtype)
    if not are_as_they_come() and (strips := in_strips(product)):
        product, multiply = strips, partial(_over_strips, layer)
    return over_safe_rows(product, hidden, multiply)


def _over_strips(layer: nn.Module, rows: mx.array) -> mx.array:
    """Multiply rows [M, K] by the strips of a layer, which are made once for a weight.

    Whoever changes a weight replaces it; nobody writes into it.
    """
    strips = getattr(layer, "_strips", None)
    if strips is None or layer["weight"] is not strips.weight:
        layer._strips = strips = Strips(layer["weight"])
        layer["weight"] = strips.weight
    results: mx.array = strips.multiply(rows)
    return results + layer["bias"] if "bias" in layer else results


def _product(layer: nn.Module, size: int, dtype: mx.Dtype) -> Product:
    quantised = None
    if "scales" in layer:
        quantised = (layer.bits, layer.group_size, layer.mode)
    return Product(
        dtype=name_of(dtype),
        size=size,
        width=layer["weight"].shape[-2],  # a module finds an attribute 30 times as slowly
        has_bias="bias" in layer,
        quantised=quantised,
    )


@cache
def name_of(dtype: mx.Dtype) -> str:
    """Name a number type as `numerics.rows.Product` does."""
    return str(dtype).removeprefix("mlx.core.")
