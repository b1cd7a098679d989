"""Reads the outputs of some layers of a target without changing the target's code."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

EMBEDDING = -1  # the layer id of the embedding's output


class Taps:
    """Records what the tapped layers returned in the last forward pass.

    A tapped layer keeps its parameters and its place; only its class becomes a recording
    subclass, so the model's logits stay the same bit for bit.

    Args:
        layers: the target's decoder layers, in order.
        layer_ids: which outputs to read, 0-based; -1 is the embedding's output, as the first
            layer gets it. The features keep this order.

    Source:
        DeepSpec's `target_layer_ids`: the residual stream after decoder layer l, before any norm.
    """

    def __init__(self, layers: Sequence[nn.Module], layer_ids: Sequence[int]) -> None:
        self._layer_ids = tuple(layer_ids)
        self._outputs: dict[int, mx.array] = {}
        for layer_id in self._layer_ids:
            if layer_id == EMBEDDING:
                _record_input(layers[0], self._outputs)
            else:
                _record_output(layers[layer_id], layer_id, self._outputs)

    def take(self) -> mx.array | None:
        """Return the features [B, T, m*E] of the last pass and forget them; None without taps.

        Raises:
            LookupError: the model does not run its layers as wholes.
        """
        if not self._layer_ids:
            return None
        if missing := set(self._layer_ids) - set(self._outputs):
            raise LookupError(f"its code runs parts of layers {sorted(missing)}, not the layers")
        return mx.concatenate([self._outputs.pop(i) for i in self._layer_ids], axis=-1)


def _record_output(layer: nn.Module, layer_id: int, outputs: dict[int, mx.array]) -> None:
    plain = type(layer)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        result = plain.__call__(self, *args, **kwargs)
        outputs[layer_id] = result[0] if isinstance(result, tuple) else result
        return result

    _change_class(layer, call)


def _record_input(layer: nn.Module, outputs: dict[int, mx.array]) -> None:
    plain = type(layer)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        outputs[EMBEDDING] = next(iter((*args, *kwargs.values())))
        return plain.__call__(self, *args, **kwargs)

    _change_class(layer, call)


def _change_class(layer: nn.Module, call: Callable[..., object]) -> None:
    plain = type(layer)
    layer.__class__ = type(plain.__name__, (plain,), {"__call__": call})
