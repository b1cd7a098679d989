"""A target: an mlx-lm model, unmodified, whose layers are tapped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from dspark_batch.caches.positions import PositionCache
from dspark_batch.caches.slot_cache import MakeLayer, SlotCache
from dspark_batch.caches.states import StateCache
from dspark_batch.errors import ModelError
from dspark_batch.models import qwen3_5
from dspark_batch.models.attention import let_caches_choose
from dspark_batch.models.joined_layers import join_layers, write_in_place
from dspark_batch.models.narrow_head import NarrowHead
from dspark_batch.models.recurrent import Recurrent, let_caches_record, recurrent_layers
from dspark_batch.models.taps import Taps
from dspark_batch.numerics.rows import as_they_come


@dataclass(frozen=True, slots=True)
class PairConfig:
    """What the rest of the program needs to know of a loaded pair."""

    family: str | None  # None: target and drafter were named one by one
    dtype: str  # of the computation
    context_length: int  # most positions of prompt and answer together
    stop_ids: frozenset[int]
    # Digests and what else tells one pair from another; "drafter", "calibration" and "drafting" can
    # change only rows that were drawn by the rejection rule.
    identity: dict[str, str | None]
    # By block position, what confidence logits are divided by; None: not calibrated.
    confidence_temperatures: tuple[float, ...] | None = None


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
    def of(cls, model: nn.Module, config: Mapping[str, Any] | None = None) -> "TargetFacts":
        """Read the facts off a model as mlx-lm built it, multimodal wrappers included.

        Args:
            model: its weights may be missing.
            config: the config.json that it was built from, which knows more than mlx-lm's models.

        Raises:
            ModelError: this model cannot be a target; one sentence says why.
        """
        kind = getattr(model, "model_type", "unknown")
        if reason := why_not(model):
            raise ModelError(f"a target of type {kind} {reason}. Name another --target.")
        text = text_model(model)
        embedding = embedding_of(text)
        body = vars(text.model) if "model" in text else {}
        scale = _first(_EMBED_SCALE, body, vars(text.args))
        if text.args.model_type in _SCALED_AT_LOAD:
            scale = 1.0
        hidden_size = embedding.weight.shape[-1]
        if "scales" in embedding:
            hidden_size = embedding.scales.shape[-1] * embedding.group_size
        if scale is None:
            scale = hidden_size**0.5 if text.args.model_type in _ROOT_SCALED else 1.0
        return cls(
            hidden_size=hidden_size,
            vocab_size=text.args.vocab_size,
            num_layers=len(model.layers),
            context_length=context_length_of(config or {}, vars(text.args)),
            embed_scale=scale,
            logit_softcap=_first(("final_logit_softcapping",), vars(text), vars(text.args)),
        )


# How configs and mlx-lm's models call what a drafter and the engine must know; the first counts.
_CONTEXT_LENGTH = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "block_size",
)
_EMBED_SCALE = ("embed_scale", "embedding_multiplier", "scale_emb")
_SCALED_AT_LOAD = ("falcon_h1",)  # mlx-lm scales the rows themselves
_ROOT_SCALED = ("gemma", "gemma2", "gemma3_text")  # by the root of the hidden size, in their code
_KEYS_AND_VALUES = (KVCache, RotatingKVCache)
Layers: TypeAlias = tuple[MakeLayer, ...]  # of one place in the list that a model gets
_ENDS = (nn.Linear, nn.QuantizedLinear)
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def why_not(model: nn.Module) -> str | None:
    """Say what of a model does not fit; None: nothing that shows before it runs.

    Weights may be missing, so a run and `check` refuse alike.
    """
    if others := sorted({type(each).__name__ for each in _unknown(model)}):
        return (
            f"keeps {' and '.join(others)} of a sequence, expected keys and values of attention, "
            "or states whose recurrence is known here, since nothing else can be rolled back"
        )
    text = text_model(model)
    if not hasattr(getattr(text, "args", None), "vocab_size") or _embedding_in(text) is None:
        return "is described otherwise by mlx-lm than the models that are known here"
    return None


def layers_of(model: nn.Module) -> list[Layers]:
    """List what stands for each cache of mlx-lm's; for those that `why_not` refuses, nothing."""
    recurrent, caches = iter(recurrent_layers(model)), make_prompt_cache(model)
    made = [[_maker(each, recurrent) for each in _members(cache)] for cache in caches]
    return [tuple(make for make in layer if make is not None) for layer in made]


def _unknown(model: nn.Module) -> list[object]:
    """List mlx-lm's caches of a model for which we have no layer."""
    recurrent = iter(recurrent_layers(model))
    members = [each for cache in make_prompt_cache(model) for each in _members(cache)]
    return [each for each in members if _maker(each, recurrent) is None]


def _members(cache: object) -> Sequence[object]:
    """List the caches of one layer: attention and recurrence side by side, or one alone."""
    inner = cache.caches if isinstance(cache, CacheList) else ()
    return inner if any(isinstance(each, ArraysCache) for each in inner) else (cache,)


def _maker(cache: object, recurrent: Iterator[Recurrent]) -> MakeLayer | None:
    """Say what makes the layer that stands for one of mlx-lm's caches; None: nothing does."""
    if type(cache) in _KEYS_AND_VALUES:
        return PositionCache
    kind = next(recurrent, None) if isinstance(cache, ArraysCache) else None
    if not isinstance(cache, ArraysCache) or kind is None or kind.num_arrays != len(cache.cache):
        return None
    return partial(StateCache, window=kind.window, recurrence=kind.recurrence)


def context_length_of(config: Mapping[str, Any], args: Mapping[str, Any] | None = None) -> int:
    """Look up the most positions in a config.json, or in what mlx-lm's model took from it.

    Raises:
        ModelError: neither says it.
    """
    length = _first(_CONTEXT_LENGTH, text_config(config), args or {})
    if length is None:
        raise ModelError(
            "config.json has no max_position_embeddings, expected the target's context length. "
            "Add it, or name another --target."
        )
    return length


def _first(names: Sequence[str], *places: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Look a fact up under its names, in one place after the other; None: nowhere."""
    return next((p[n] for p in places for n in names if p.get(n) is not None), None)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a target's config.json."""
    return config.get("text_config") or config


def for_mlx_lm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what mlx-lm's loader must be told about a config that transformers wrote."""
    changes = {}
    if "vocab_size" not in config and "vocab_size" in text_config(config):
        changes["vocab_size"] = text_config(config)["vocab_size"]  # it reads only the outer one
    if config.get("model_type") == "gemma4_unified_text":
        changes["model_type"] = "gemma4_text"
    return changes | qwen3_5.for_mlx_lm(config)


@dataclass(frozen=True, slots=True)
class TargetEnds:
    """The target's own embedding and head, for drafters that have none.

    Functions, so that the target's weights do not become the drafter's parameters.
    """

    embed: Callable[[mx.array], mx.array]  # ids [...] to rows [..., E], not scaled
    head: Callable[[mx.array], mx.array]  # [..., E] to logits [..., V], not capped


def ends_of(model: nn.Module) -> TargetEnds:
    """Return a model's own embedding and head, as they are stored: quantised or not."""
    text = text_model(model)
    embedding, own = embedding_of(text), head_of(text)

    def tied(hidden: mx.array) -> mx.array:
        """Look the head up when it runs: by then its rows may be safe."""
        logits: mx.array = embedding.as_linear(hidden)
        return logits

    return TargetEnds(embedding, tied if own is embedding else own)


def embedding_of(text: nn.Module) -> nn.Module:
    """Find the token embedding of a text model that `why_not` has nothing against."""
    found = _embedding_in(text)
    if found is None:
        raise ModelError("has no token embedding that we see")
    return found


def _embedding_in(text: nn.Module) -> nn.Module | None:
    """Find the one with the fewest rows that has enough: others may be of positions."""
    found = (m for _, m in _outside_layers(text) if isinstance(m, _EMBEDDINGS))
    fitting = (m for m in found if m.weight.shape[0] >= text.args.vocab_size)
    return min(fitting, key=lambda m: m.weight.shape[0], default=None)


def head_of(text: nn.Module) -> nn.Module:
    """Find the head of a text model: the embedding, if it is tied."""
    heads = (m for _, m in _outside_layers(text) if isinstance(m, _ENDS))
    fitting = (m for m in heads if m.weight.shape[0] >= text.args.vocab_size)
    head = next(fitting, None)
    return embedding_of(text) if head is None else head


def _outside_layers(text: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the modules of a text model that are not in a layer, by name."""
    return sorted(
        (name, module)
        for name, module in text.named_modules()
        if not any(part.isdigit() for part in name.split("."))
    )


def text_model(model: nn.Module) -> nn.Module:
    """Return the part of a target that owns the embedding and the head."""
    return model.language_model if "language_model" in model else model


def by_itself(model: nn.Module, tokens: mx.array) -> mx.array:
    """Run tokens [B, T] as mlx-lm does, over its own caches; logits [B, T, V]."""
    with as_they_come():
        logits: mx.array = model(tokens, cache=make_prompt_cache(model))
        return logits


class Target:
    """The model whose text is wanted.

    Args:
        model: from mlx-lm.
        tap_ids: layers whose outputs the drafter reads; empty for none.
        config: of the pair that it was loaded with; None if it was not loaded.

    Attributes:
        writes_in_place: see `models.joined_layers.write_in_place`.
    """

    def __init__(
        self, model: nn.Module, tap_ids: Sequence[int] = (), config: PairConfig | None = None
    ) -> None:
        let_caches_choose(model)
        join_layers(model.layers, text_model(model).get("model", {}).get("norm"))
        self.model = model
        self.config = config
        self.writes_in_place = write_in_place(model.layers)
        self._taps = Taps(model.layers, tap_ids)
        let_caches_record(model)
        self._layers = layers_of(model)
        self._head = NarrowHead(head_of(text_model(model)))

    @cached_property  # it walks the whole model
    def facts(self) -> TargetFacts:
        """What a drafter must fit."""
        known = {"max_position_embeddings": self.config.context_length} if self.config else None
        return TargetFacts.of(self.model, known)

    def make_cache(self, slots: int, positions: int) -> SlotCache:
        """Make what the model remembers of so many slots, with room for so many positions each."""
        makers = [make for group in self._layers for make in group]
        return SlotCache(makers, slots, positions)

    def cached_bytes(self) -> tuple[int, int]:
        """Say what a cache takes for a position, and for a slot besides: by shapes alone."""
        cache = self.make_cache(1, 1)
        self(mx.array([[0]]), cache)
        cache.keep(mx.array([1]))
        return cache.bytes_per_position, cache.bytes_per_slot

    def __call__(
        self, tokens: mx.array, cache: SlotCache, at: mx.array | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """Run one step over tokens [B, T].

        Args:
            tokens: [B, T].
            cache: of the B slots.
            at: [B, P], the only tokens of each slot whose logits are wanted; None: all of them.

        Returns:
            Logits [B, T, V], or [B, P, V], and the tapped features [B, T, m*E]; None without taps.
        """
        layers = iter(cache.layers)
        groups = [tuple(islice(layers, len(group))) for group in self._layers]
        caches = [group if len(group) > 1 else group[0] for group in groups]
        if at is None:
            return self._run(tokens, caches)
        with self._head.at(at, tokens.shape):
            logits, features = self._run(tokens, caches)
        if not self._head.has_narrowed:  # not by the head that we know
            logits = mx.take_along_axis(logits, at[..., None], axis=1)
        return logits, features

    @property
    def multiplies_by_its_head(self) -> bool:
        """Whether the last step whose logits were wanted in places called the head that we know.

        Else the model's code multiplies by the head's weight itself, over as many rows as come.
        """
        return self._head.has_narrowed

    def by_itself(self, tokens: mx.array) -> tuple[mx.array, mx.array | None]:
        """Run tokens [B, T] as mlx-lm does, over its own caches; else as a step."""
        return by_itself(self.model, tokens), self._taps.take()

    def _run(self, tokens: mx.array, caches: Sequence[object]) -> tuple[mx.array, mx.array | None]:
        logits = self.model(tokens, cache=caches)
        return logits, self._taps.take()
