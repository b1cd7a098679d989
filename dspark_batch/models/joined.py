"""Projections of the same input as one product: fewer and larger kernels for a GPU."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

# By group, the attributes of a module that mlx-lm's models call on one and the same array.
OF_TARGET = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OF_DRAFTER = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join_projections(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Join dense layers of a model, in place; quantised ones stay as they are.

    The weights are held once, as before. A result may differ in its last bits, so this comes
    before anything that is compared.
    """
    for module in model.modules():
        for names in groups:
            present = [name for name in names if _is_dense(module, name)]
            if len(present) > 1:
                for name, part in zip(present, _parts([module[n] for n in present]), strict=True):
                    setattr(module, name, part)


def _is_dense(module: nn.Module, name: str) -> bool:
    return name in module and type(module[name]) is nn.Linear


def _parts(layers: Sequence[nn.Linear]) -> Iterator[nn.Module]:
    if any("bias" in layer for layer in layers):
        yield from layers
        return
    joined = _Joined(mx.concatenate([layer.weight for layer in layers]))
    stop = 0
    for layer in layers:
        start, stop = stop, stop + layer.weight.shape[0]
        yield _Part(joined, start, stop)


class _Joined:
    """The product of the last input with all weights [out, in]."""

    def __init__(self, weight: mx.array) -> None:
        mx.eval(weight)
        self._weight = weight
        self._input: mx.array | None = None
        self._output: mx.array | None = None

    def __call__(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        if hidden is not self._input:
            self._input, self._output = hidden, hidden @ self._weight.T
        output = self._output[..., start:stop]
        if stop == self._weight.shape[0]:  # the last of the group has asked
            self._input = self._output = None
        return output


class _Part(nn.Module):
    """Stands where one of the layers was."""

    def __init__(self, joined: _Joined, start: int, stop: int) -> None:
        super().__init__()
        self._joined, self._start, self._stop = joined, start, stop

    def __call__(self, hidden: mx.array) -> mx.array:
        return self._joined(hidden, self._start, self._stop)
