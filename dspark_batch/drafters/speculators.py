"""Drafters that vLLM's speculators library trained: DSpark under another schema."""

from collections.abc import Mapping

import mlx.core as mx

from dspark_batch.drafters import qwen3
from dspark_batch.drafters.dflash import read_attention
from dspark_batch.drafters.draft_layer import FamilySettings
from dspark_batch.drafters.drafter_config import (
    Attention,
    DrafterConfig,
    layer_ids,
    mask_token,
    read_heads,
)
from dspark_batch.models.config_reader import ConfigReader
from dspark_batch.models.target import TargetFacts

_TRAINING_ONLY = ("t2d", "verifier_lm_head.weight", "verifier_norm.weight")

Weights = Mapping[str, mx.array]


def read_speculators(
    read: ConfigReader, weights: Weights, target: TargetFacts
) -> tuple[DrafterConfig, Weights]:
    """Translate the config, and leave out tensors that only training needs.

    Raises:
        ModelError: a key is missing, or says something that this program cannot do.

    Source:
        github.com/vllm-project/speculators, models/dspark and models/dflash; vLLM's loader of
        them, qwen3_dspark.py. The embedding and a whole head are the target's rows without its
        scale and its cap, and are mostly not stored.
    """
    inner = read.part("transformer_layer_config")
    inner.one_of("model_type", "qwen3")
    vocab, drafted = inner.count("vocab_size"), read.count("draft_vocab_size")
    _check_width(read, inner)
    config = DrafterConfig(
        family=qwen3.FAMILY,
        settings=FamilySettings(qwen3.read_layer(inner)),
        num_hidden_layers=inner.count("num_hidden_layers"),
        vocab_size=vocab,
        block_size=read.count("block_size", least=2),
        target_layer_ids=_layer_ids(read, target),
        mask_token_id=mask_token(read, vocab),
        num_target_layers=target.num_layers,
        attention=_attention(read, inner),
        anchor_predicts=_anchor_predicts(read),
        own_embedding="embed_tokens.weight" in weights,
        own_head=drafted != vocab or "lm_head.weight" in weights,
        draft_vocab_size=None if drafted == vocab else drafted,
        **read_heads(read),
    )
    if config.draft_vocab_size is not None:
        _check_table(read, weights, config.draft_vocab_size, config.vocab_size)
    return config, {name: w for name, w in weights.items() if name not in _TRAINING_ONLY}


def _check_width(read: ConfigReader, inner: ConfigReader) -> None:
    width, target_width = inner.count("hidden_size"), read.get("target_hidden_size")
    if target_width not in (None, width):
        read.refuse(
            f"target_hidden_size is {target_width}, expected the drafter's hidden_size {width}."
        )


def _layer_ids(read: ConfigReader, target: TargetFacts) -> tuple[int, ...]:
    """Read the taps: id i is the input of layer i, so the output of layer i - 1.

    Source:
        vLLM's conversion of such configs (vllm#40727). Whether the last id means the state before
        or after the final norm is nowhere said, so it is refused.
    """
    return layer_ids(read, "aux_hidden_state_layer_ids", target.num_layers - 1, shift=1)


def _anchor_predicts(read: ConfigReader) -> bool:
    """Tell whether the anchor's slot drafts.

    Source:
        speculators before `sample_from_anchor` existed trained without that slot (sglang#30982).
    """
    return read.flag("sample_from_anchor") if read.get("sample_from_anchor") is not None else False


def _attention(read: ConfigReader, inner: ConfigReader) -> tuple[Attention, ...]:
    """Read what each layer sees; as in training, a window counts back from the anchor."""
    causal = not read.get("sliding_window_non_causal", False)
    return read_attention(inner, sliding_is_causal=causal, from_anchor=True)


def _check_table(read: ConfigReader, weights: Weights, size: int, vocab_size: int) -> None:
    """Check the table from the drafter's tokens to the target's."""
    if size > vocab_size:
        read.refuse(f"draft_vocab_size is {size}, expected at most {vocab_size}.")
    table = weights.get("d2t")
    if table is None or table.shape != (size,):
        found = "missing" if table is None else f"of shape {table.shape}"
        read.refuse(f"draft_vocab_size is {size}, but the table d2t is {found}.")
    ids = mx.arange(size) + table
    if not mx.logical_and((ids[1:] > ids[:-1]).all(), ids[-1] < vocab_size).item():
        read.refuse("the table d2t does not name rising token ids of the target.")
