"""Makes the linear layers of a model multiply over safe rows; see `numerics.rows`."""

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.numerics.rows import Product, over_safe_rows


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


class _SafeLinear(nn.Module):
    """A linear layer, quantised or not."""

    def __call__(self, hidden: mx.array) -> mx.array:
        return _by_rows(self, hidden, super().__call__)


class _SafeEmbedding(nn.Module):
    """An embedding that may be a head, quantised or not."""

    def as_linear(self, hidden: mx.array) -> mx.array:
        return _by_rows(self, hidden, super().as_linear)


_SAFE = {
    nn.Linear: _SafeLinear,
    nn.QuantizedLinear: _SafeLinear,
    nn.Embedding: _SafeEmbedding,
    nn.QuantizedEmbedding: _SafeEmbedding,
}


def _by_rows(layer: nn.Module, hidden: mx.array, multiply: object) -> mx.array:
    rows = hidden.reshape(-1, hidden.shape[-1])
    results = over_safe_rows(_product(layer, rows), rows, multiply)
    return results.reshape(*hidden.shape[:-1], -1)


def _product(layer: nn.Module, rows: mx.array) -> Product:
    quantised = None
    if "scales" in layer:
        quantised = (layer.bits, layer.group_size, layer.mode)
    return Product(
        dtype=str(rows.dtype).removeprefix("mlx.core."),
        size=rows.shape[-1],
        width=layer.weight.shape[0],
        has_bias="bias" in layer,
        quantised=quantised,
    )
