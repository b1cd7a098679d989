"""A frozen target that tells what it knew at every position of a text."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.models.taps import Taps
from dspark_batch.models.target import TargetFacts, embedding_of, head_of, text_model
from dspark_batch.train.fit import compute_dtype

_PROBE_TOKENS = 8
_IS_ONE = 0.02  # a measured scale this near to 1 is 1


class Teacher(NamedTuple):
    """What the target knew of N rows."""

    features: mx.array  # [N, T, m*E], tapped outputs
    logits: mx.array  # [N, P, V], at the positions that were asked for


class TappedTarget:
    """A target whose layers are read, and whose head runs only where it is asked.

    The head takes most of the memory of a pass, and a step needs it at few positions. What a family
    does to its logits, a scale or a cap, happens behind the head and so is kept.
    """

    def __init__(self, model: nn.Module, layer_ids: Sequence[int]) -> None:
        self._model, self._taps = model, Taps(model.layers, layer_ids)
        self._rows = _Rows()
        text = text_model(model)
        self._vocab = text.args.vocab_size
        _select_rows(head_of(text), self._rows)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Read tokens [N, T]; returns the features [N, T, m*E]."""
        return self.teach(tokens, mx.zeros((tokens.shape[0], 1), mx.int32)).features

    def teach(self, tokens: mx.array, positions: mx.array) -> Teacher:
        """Read tokens [N, T], and predict what follows at positions [N, P]."""
        self._rows.positions = positions
        try:
            logits = self._model(tokens)
        finally:
            self._rows.positions = None
        return Teacher(
            mx.stop_gradient(self._taps.take().astype(compute_dtype())),
            mx.stop_gradient(logits[..., : self._vocab]),
        )

    def logit_scale(self, softcap: float | None) -> float:
        """Measure by what the model multiplies its head's output, before it caps it."""
        tokens, outputs = mx.arange(_PROBE_TOKENS)[None] + 1, []
        self._rows.outputs = outputs
        logits = self.teach(tokens, mx.arange(_PROBE_TOKENS)[None]).logits.astype(mx.float32)
        self._rows.outputs = None
        head = outputs[0][..., : self._vocab].astype(mx.float32)
        if softcap is not None:
            logits = softcap * mx.arctanh(mx.clip(logits / softcap, -0.99, 0.99))
        scale = ((logits * head).sum() / (head * head).sum()).item()
        return 1.0 if abs(scale - 1) < _IS_ONE else scale


class Ends(NamedTuple):
    """The embedding and the head that a drafter of DeepSpec's packaging stores, [V, E] each."""

    embedding: mx.array
    head: mx.array


def ends_for_drafter(model: nn.Module, facts: TargetFacts, logit_scale: float) -> Ends:
    """Copy a target's embedding and head, its scales multiplied in; nothing else is changed."""
    text = text_model(model)
    embedding, head = _matrix(embedding_of(text)), _matrix(head_of(text))
    return Ends(
        _scaled(embedding[: facts.vocab_size], facts.embed_scale),
        _scaled(head[: facts.vocab_size], logit_scale),
    )


class _Rows:
    """Which rows a head computes in this pass."""

    positions: mx.array | None = None  # [N, P]; None: all
    outputs: list[mx.array] | None = None  # what it gave; None: nobody wants to know


def _select_rows(head: nn.Module, rows: _Rows) -> None:
    """Let a head, or an embedding that is one, run over chosen positions of [N, T, E] only."""
    plain = type(head)
    verb = "as_linear" if hasattr(plain, "as_linear") else "__call__"
    multiply = getattr(plain, verb)

    def over_rows(self: nn.Module, hidden: mx.array) -> mx.array:
        if rows.positions is None:
            return multiply(self, hidden)
        chosen = mx.take_along_axis(hidden, rows.positions[..., None], axis=1)
        output = multiply(self, chosen)
        if rows.outputs is not None:
            rows.outputs.append(output)
        return output

    head.__class__ = type(plain.__name__, (plain,), {verb: over_rows})


def _matrix(module: nn.Module) -> mx.array:
    if "scales" not in module:
        return module.weight
    return mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        module.group_size,
        module.bits,
        mode=module.mode,
    )


def _scaled(matrix: mx.array, scale: float) -> mx.array:
    return matrix if scale == 1 else matrix * scale
