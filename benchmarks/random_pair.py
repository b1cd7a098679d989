"""A target and its drafter of a real size with random weights, for benchmarks of cost.

The target continues every token with a fixed other one, by a wide margin: the rows of its head are
those of its embedding in another order, and its layers add less than the embedding does. So any
batch, any kernel and any program says the same, and what comes next is known without a run. What a
step costs does not depend on it. The head is stored apart from the embedding for this; a tied head
is the same product.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen3

from dspark_batch import device
from dspark_batch.drafters.drafter_config import DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.models.joined_layers import join_draft_layers
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.models.target import PairConfig, Target, ends_of
from dspark_batch.pair import Pair

HEAD_SCALE = 0.02  # makes logits of about 1, and of about 30 for the token that follows


@dataclass(frozen=True, slots=True)
class Size:
    """The sizes of a pair; the drafter's layers are as wide as the target's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    draft_layers: int
    taps: tuple[int, ...]
    markov_rank: int
    block: int = 7
    context_length: int = 4096


SIZES = {
    "4b": Size(2560, 36, 32, 8, 128, 9728, 151936, 5, (1, 9, 17, 25, 33), 256),
    "toy": Size(64, 4, 4, 2, 16, 128, 512, 2, (0, 2), 8),
}


def random_pair(name="4b", dtype=mx.bfloat16, seed=7):
    """Make a pair; returns it and the token [V] int32 that follows each token."""
    device.keep_memory_free()
    size, key = SIZES[name], mx.random.key(seed)
    model_key, draft_key, order_key = mx.random.split(key, 3)
    model = qwen3.Model(_target_args(size))
    randomise(model, model_key, dtype, size.layers)
    follower = mx.random.permutation(size.vocabulary, key=order_key).astype(mx.int32)
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight = HEAD_SCALE * embedding[mx.argsort(follower)]
    drafter = DSparkDrafter(_drafter_config(size), ends_of(model))
    drafter.borrow(embedding=True, head=True)
    randomise(drafter, draft_key, dtype, size.draft_layers)
    mx.eval(model.parameters(), drafter.parameters(), follower)
    make_rows_safe(model)
    make_rows_safe(drafter)
    join_draft_layers(drafter.layers, drafter.norm)
    config = PairConfig(None, str(dtype), size.context_length, frozenset(), {"weights": "random"})
    return Pair(Target(model, size.taps, config), None, drafter, config), follower


def randomise(module, key, dtype, layers):
    """Draw matrices that keep the variance of what they multiply; norms stay 1."""
    drawn = []
    for name, shape in [(name, array.shape) for name, array in tree_flatten(module.parameters())]:
        key, own = mx.random.split(key)
        if len(shape) == 1:
            drawn.append((name, mx.ones(shape, dtype)))
            continue
        is_table = "embed_tokens" in name or "markov_w1" in name
        scale = 1.0 if is_table else shape[-1] ** -0.5
        if any(word in name for word in ("o_proj", "out_proj", "down_proj")):
            scale *= (2 * layers) ** -0.5
        drawn.append((name, (scale * mx.random.normal(shape, key=own)).astype(dtype)))
        mx.eval(drawn[-1][1])
    module.update(tree_unflatten(drawn))


def _target_args(size):
    return qwen3.ModelArgs(
        model_type="qwen3",
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.mlp,
        num_attention_heads=size.heads,
        rms_norm_eps=1e-6,
        vocab_size=size.vocabulary,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context_length,
        head_dim=size.head_dim,
        tie_word_embeddings=False,
        rope_theta=1e6,
    )


def _drafter_config(size):
    """The config.json of DeepSpec's drafter for Qwen3-4B, with these sizes."""
    return DrafterConfig.from_dict(
        {
            "architectures": ["Qwen3DSparkModel"],
            "num_hidden_layers": size.draft_layers,
            "hidden_size": size.hidden,
            "intermediate_size": size.mlp,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": size.context_length,
            "vocab_size": size.vocabulary,
            "block_size": size.block,
            "target_layer_ids": list(size.taps),
            "mask_token_id": size.vocabulary - 1,
            "num_target_layers": size.layers,
            "markov_rank": size.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }
    )


def num_parameters(module: nn.Module, *without: str):
    """Count the numbers in a module's matrices, less those whose names contain some words."""
    return sum(
        array.size
        for name, array in tree_flatten(module.parameters())
        if array.ndim > 1 and not any(word in name for word in without)
    )
