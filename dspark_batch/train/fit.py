"""One training step for any model: float32 masters, AdamW, clipped gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dspark_batch import device
from dspark_batch.numerics.arrays import named_arrays
from dspark_batch.train.muon import Muon

Params = dict[str, Any]  # a tree of arrays, as `nn.Module.trainable_parameters` returns it
OPTIMIZER = "Muon by size and AdamW"  # a state of another one cannot be gone on with
_MATRIX_RATE = 8.0  # of Muon, whose updates of a matrix of width 576 have entries of 1/24
Loss = Callable[..., tuple[mx.array, ...]]  # of a batch: the scalar to minimise, then its terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast to train, and with which chance."""

    steps: int
    peak_lr: float
    warmup: int  # steps from 0 to the peak; a cosine to 0 follows
    beta2: float = 0.999
    clip: float = 1.0  # largest global norm of the gradients
    seed: int = 0

    def optimizer(self) -> optimizers.Optimizer:
        """Make the optimiser, with its learning rate over time: Muon for the layers' matrices."""
        rise = optimizers.linear_schedule(self.peak_lr / self.warmup, self.peak_lr, self.warmup)
        fall = optimizers.cosine_decay(self.peak_lr, max(1, self.steps - self.warmup))
        rate = optimizers.join_schedules([rise, fall], [self.warmup])
        adamw = optimizers.AdamW(
            rate, betas=[0.9, self.beta2], weight_decay=0.0, bias_correction=True
        )
        muon = Muon(lambda step: _MATRIX_RATE * rate(step))
        return optimizers.MultiOptimizer([muon, adamw], [_is_inner_matrix])

    def key(self, step: int) -> mx.array:
        """Give the chance of a step, whatever steps ran before it in this process."""
        return mx.random.key((self.seed << 32) + step)


def _is_inner_matrix(name: str, parameter: mx.array) -> bool:
    """Whether a parameter maps a hidden vector to another: no embedding, head, norm or bias."""
    return parameter.ndim == 2 and ("layers." in name or name.startswith("fc."))


def compute_dtype() -> mx.Dtype:
    """Choose what models compute in: bf16 on a GPU, float32 on a CPU, where bf16 is slow."""
    return mx.float32 if device.is_cpu() else mx.bfloat16


class Trainer:
    """Owns a model's float32 masters while it trains.

    The model itself computes in `compute_dtype`; `finish` writes the masters back into it.
    """

    def __init__(self, model: nn.Module, loss: Loss, schedule: Schedule) -> None:
        self._model, self._dtype = model, compute_dtype()
        self._masters: dict[str, Params] = {
            "params": tree_map(lambda p: p.astype(mx.float32), model.trainable_parameters())
        }
        model.freeze()  # what is left is constant, and may compute in `dtype` throughout
        model.update(tree_map(lambda p: p.astype(self._dtype), model.parameters()))
        self._optimizer = schedule.optimizer()
        self._optimizer.init(self._masters["params"])
        self._loss, self._clip = loss, schedule.clip

    def step(self, *batch: mx.array) -> tuple[mx.array, ...]:
        """Update once, and return the loss with its terms."""
        values = self._update(*batch)
        mx.async_eval(values, self._masters, self._optimizer.state)
        return values

    def finish(self) -> None:
        """Write the masters back into the model, in float32."""
        self._model.update(self._masters["params"])
        mx.eval(self._model.parameters())

    def state(self) -> dict[str, mx.array]:
        """List all that the next step depends on, besides its batch."""
        return dict(tree_flatten({"masters": self._masters, "optimizer": self._optimizer.state}))

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """Go on from where `state` was listed."""
        tree = tree_unflatten(list(state.items()))
        self._masters = tree["masters"]
        self._optimizer.state = tree["optimizer"]
        self._optimizer.init(self._masters["params"])

    def _update(self, *batch: mx.array) -> tuple[mx.array, ...]:
        values, grads = mx.value_and_grad(self._evaluate)(self._masters["params"], *batch)
        # Dicts have another order in each process; what is summed over them should not.
        grads = tree_unflatten(sorted(dict(tree_flatten(grads)).items(), key=itemgetter(0)))
        grads, _ = optimizers.clip_grad_norm(grads, self._clip)
        self._masters["params"] = self._optimizer.apply_gradients(grads, self._masters["params"])
        return values

    def _evaluate(self, params: Params, *batch: mx.array) -> tuple[mx.array, ...]:
        self._model.update(tree_map(lambda p: p.astype(self._dtype), params))
        return self._loss(*batch)


def initialize(model: nn.Module, key: mx.array, scale: float = 0.02) -> None:
    """Draw every matrix from a normal distribution; biases become 0, and norms stay 1.

    Source:
        transformers' default (`initializer_range`), which DeepSpec starts from.
    """
    weights = []
    for name, value in named_arrays(model):
        key, own = mx.random.split(key)
        if value.ndim == 2:
            value = mx.random.normal(value.shape, scale=scale, key=own)
        elif name.endswith("bias"):  # MLX drew it, from a state that nobody set
            value = mx.zeros_like(value)
        weights.append((name, value))
    model.load_weights(weights)
