"""What a drafter checkpoint's config.json says, checked key by key."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dspark_batch.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """The settings of a DeepSpec drafter.

    Source:
        DeepSpec checkpoints; defaults only where the reference code has them.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_parameters: Mapping[str, Any] | None  # scaling, as mlx-lm's initialize_rope reads it
    max_position_embeddings: int
    attention_bias: bool
    block_size: int  # drafts per block
    target_layer_ids: tuple[int, ...]  # the tapped layers, 0-based
    mask_token_id: int
    num_target_layers: int
    markov_rank: int  # 0: no Markov head, all positions drafted at once
    markov_head_type: str | None  # "vanilla", "gated", "rnn"; None without a Markov head
    enable_confidence_head: bool
    confidence_head_with_markov: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "config.json") -> "DrafterConfig":
        """Read a parsed config.json.

        Args:
            config: the file's content.
            where: the file's name, for messages.

        Raises:
            ModelError: a key is missing or two keys contradict each other.
        """
        read = _Reader(config, where)
        rank = read.required("markov_rank")
        confident = read.required("enable_confidence_head")
        theta, rope = read.rope()
        return cls(
            hidden_size=read.required("hidden_size"),
            intermediate_size=read.required("intermediate_size"),
            num_hidden_layers=read.required("num_hidden_layers"),
            num_attention_heads=read.required("num_attention_heads"),
            num_key_value_heads=read.required("num_key_value_heads"),
            head_dim=read.required("head_dim"),
            vocab_size=read.required("vocab_size"),
            rms_norm_eps=read.required("rms_norm_eps"),
            rope_theta=theta,
            rope_parameters=rope,
            max_position_embeddings=read.required("max_position_embeddings"),
            attention_bias=config.get("attention_bias", False),
            block_size=read.required("block_size"),
            target_layer_ids=read.layer_ids(),
            mask_token_id=read.required("mask_token_id"),
            num_target_layers=read.required("num_target_layers"),
            markov_rank=rank,
            markov_head_type=read.exactly_if("markov_head_type", rank > 0),
            enable_confidence_head=confident,
            confidence_head_with_markov=bool(
                read.exactly_if("confidence_head_with_markov", confident)
            ),
        )

    def __post_init__(self) -> None:
        if self.confidence_head_with_markov and not self.markov_rank:
            raise ModelError(
                "The drafter's confidence_head_with_markov is true but its markov_rank is 0: "
                "the confidence head would have no Markov embedding to read."
            )


class _Reader:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where

    def required(self, key: str) -> Any:  # noqa: ANN401  JSON
        if self._config.get(key) is None:
            raise ModelError(
                f"{self._where} has no {key}: this is not a DeepSpec drafter, or not all of one. "
                "Download the checkpoint again, or name another --drafter."
            )
        return self._config[key]

    def exactly_if(self, key: str, wanted: bool) -> Any:  # noqa: ANN401  JSON
        return self.required(key) if wanted else None

    def layer_ids(self) -> tuple[int, ...]:
        ids, layers = tuple(self.required("target_layer_ids")), self.required("num_target_layers")
        rising = all(a < b for a, b in pairwise(ids))
        if not (ids and rising and ids[0] >= 0 and ids[-1] < layers):
            raise ModelError(
                f"{self._where}: target_layer_ids is {list(ids)}, expected rising layer numbers "
                f"from 0 to {layers - 1}."
            )
        return ids

    def rope(self) -> tuple[float, Mapping[str, Any] | None]:
        """Return theta and the scaling; transformers 5 nests both under rope_parameters."""
        nested = self._config.get("rope_parameters")
        if nested is None:
            return self.required("rope_theta"), self._config.get("rope_scaling")
        nested = nested.get("full_attention", nested)
        if nested.get("rope_theta") is None:
            raise ModelError(f"{self._where} has no rope_theta under rope_parameters.")
        return nested["rope_theta"], nested
