"""A target: an mlx-lm model, unmodified, whose layers are tapped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.errors import ModelError
from dspark_batch.models.attention import let_caches_choose
from dspark_batch.models.dspark import TargetEnds
from dspark_batch.models.number_type import DTYPES, stored_dtype
from dspark_batch.models.safe_layers import products_of
from dspark_batch.models.taps import Taps
from dspark_batch.numerics.rows import is_whole

_MOST_SPARE = 512  # rows of a step


@dataclass(frozen=True, slots=True)
class PairConfig:
    """What the rest of the program needs to know of a loaded pair."""

    family: str | None  # None: target and drafter were named one by one
    dtype: str  # of the computation
    context_length: int  # most positions of prompt and answer together
    stop_ids: frozenset[int]
    # Digests and what else tells one pair from another; "drafter" and "calibration" can change
    # only rows that were drawn by the rejection rule.
    identity: dict[str, str | None]
    # By block position, what confidence logits are divided by; None: not calibrated.
    confidence_temperatures: tuple[float, ...] | None = None


class LayerCache(Protocol):
    """What mlx-lm's models use of a cache."""

    offset: mx.array  # [B] int32, positions of the next tokens

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the step's keys and values; return all that the step may look at."""

    def make_mask(
        self, width: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Say which positions the step's tokens may look at."""


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a drafter must fit."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    context_length: int  # most positions
    embed_scale: float  # by which the model multiplies its embeddings
    logit_softcap: float | None  # None: its logits are not capped

    @classmethod
    def of(cls, model: nn.Module) -> "TargetFacts":
        """Read the facts off a model as mlx-lm built it, multimodal wrappers included.

        Raises:
            ModelError: mlx-lm describes this model otherwise than the ones we know.
        """
        text = text_model(model)
        try:
            return cls(
                hidden_size=text.args.hidden_size,
                vocab_size=text.args.vocab_size,
                num_layers=len(model.layers),
                context_length=text.args.max_position_embeddings,
                embed_scale=getattr(text.model, "embed_scale", 1.0),
                logit_softcap=getattr(text, "final_logit_softcapping", None),
            )
        except AttributeError as error:
            raise ModelError(
                f"mlx-lm's models of type {getattr(model, 'model_type', 'unknown')} are not known "
                f"as targets here ({error}). Name another --target."
            ) from error


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a target's config.json."""
    return config.get("text_config") or config


def ends_of(model: nn.Module) -> TargetEnds:
    """Return a model's own embedding and head, as they are stored: quantised or not."""
    text = text_model(model)
    embedding = text.model.embed_tokens

    def head(hidden: mx.array) -> mx.array:
        return text.lm_head(hidden) if "lm_head" in text else embedding.as_linear(hidden)

    return TargetEnds(embedding, head)


def text_model(model: nn.Module) -> nn.Module:
    """Return the part of a target that owns the embedding and the head."""
    return model.language_model if "language_model" in model else model


class Target:
    """The model whose text is wanted.

    Args:
        model: from mlx-lm.
        tap_ids: layers whose outputs the drafter reads; empty for none.
        config: of the pair that it was loaded with; None if it was not loaded.
    """

    def __init__(
        self, model: nn.Module, tap_ids: Sequence[int] = (), config: PairConfig | None = None
    ) -> None:
        let_caches_choose(model)
        self.model = model
        self.config = config
        self._taps = Taps(model.layers, tap_ids)
        self._spare: dict[tuple[int, int], int] = {}

    @property
    def facts(self) -> TargetFacts:
        """What a drafter must fit."""
        return TargetFacts.of(self.model)

    def spare(self, slots: int, width: int) -> int:
        """Say how many slots more a step should have, so that no product pads its rows by itself.

        On a GPU a kernel more in every layer costs the host more time than rows cost the device.
        A CPU computes every row, so there each product pads what it must.
        """
        if mx.default_device() == mx.Device(mx.cpu):
            return 0
        if (slots, width) not in self._spare:
            products = products_of(self.model, DTYPES[stored_dtype(self.model)])
            more = range(_MOST_SPARE // width)
            fits = (n for n in more if all(is_whole(p, (slots + n) * width) for p in products))
            self._spare[slots, width] = next(fits, 0)
        return self._spare[slots, width]

    def forget(self) -> None:
        """Drop what the taps recorded, after the model itself was called."""
        self._taps.take()

    @property
    def num_caches(self) -> int:
        """How many layers keep keys and values."""
        make_cache = getattr(self.model, "make_cache", None)
        return len(make_cache()) if make_cache else len(self.model.layers)

    def __call__(
        self, tokens: mx.array, caches: Sequence[LayerCache]
    ) -> tuple[mx.array, mx.array | None]:
        """Run one step over tokens [B, T].

        Returns:
            Logits [B, T, V] and the tapped features [B, T, m*E]; None without taps.
        """
        logits = self.model(tokens, cache=list(caches))
        return logits, self._taps.take()
