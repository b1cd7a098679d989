"""A frozen target that tells what it knew at every position of a text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.models.narrow_head import NarrowHead
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
        text = text_model(model)
        self._vocab, self._head = text.args.vocab_size, head_of(text)
        self._rows = NarrowHead(self._head)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Read tokens [N, T]; returns the features [N, T, m*E]."""
        return self.teach(tokens, mx.zeros((tokens.shape[0], 1), mx.int32)).features

    def teach(self, tokens: mx.array, positions: mx.array) -> Teacher:
        """Read tokens [N, T], and predict what follows at positions [N, P]."""
        with self._rows.at(positions, tokens.shape):
            logits = self._model(tokens)
        features = self._taps.take()
        if features is None:
            raise ValueError("the target has no taps, expected those of the drafter")
        if not self._rows.has_narrowed:  # not by the head that we know
            logits = mx.take_along_axis(logits, positions[..., None], axis=1)
        return Teacher(
            mx.stop_gradient(features.astype(compute_dtype())),
            mx.stop_gradient(logits[..., : self._vocab]),
        )

    def logit_scale(self, softcap: float | None) -> float:
        """Measure by what the model multiplies its head's output, before it caps it."""
        positions = mx.arange(_PROBE_TOKENS)[None]
        with _recorded(self._head) as outputs:
            logits = self.teach(positions + 1, positions).logits.astype(mx.float32)
        if not outputs:
            return 1.0
        head = outputs[0][..., : self._vocab].astype(mx.float32)
        if softcap is not None:
            logits = softcap * mx.arctanh(mx.clip(logits / softcap, -0.99, 0.99))
        scale: Any = ((logits * head).sum() / (head * head).sum()).item()
        return 1.0 if abs(scale - 1) < _IS_ONE else float(scale)


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


@contextmanager
def _recorded(head: nn.Module) -> Iterator[list[mx.array]]:
    """Collect what a head, or an embedding that is one, gives meanwhile."""
    plain, outputs = type(head), []
    verb = "as_linear" if hasattr(plain, "as_linear") else "__call__"

    def recording(self: nn.Module, hidden: mx.array) -> mx.array:
        outputs.append(getattr(plain, verb)(self, hidden))
        return outputs[-1]

    head.__class__ = type(plain.__name__, (plain,), {verb: recording})
    try:
        yield outputs
    finally:
        head.__class__ = plain


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
