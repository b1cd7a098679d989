"""What a hybrid target costs: its recurrence, and a pair of it against mlx-lm.

    python -m benchmarks.hybrid [--size 4b] [--slots 8 32 64] [--items-per-slot 2] [--max-tokens 64]
                                [--draft-length 7] [--profile math] [--parts kernel engine]

`kernel` times the recurrence of one layer, by slots and width, in microseconds: on a chain of
launches, each reading the state that the one before wrote. `loop_us` is the loop of operations that
mlx-lm has, for few tokens only. `engine` answers the same prompts plainly, with drafts, and by
mlx-lm's `BatchGenerator`: tokens per second, once after the same work as a warm-up, and how many
answers differ from those of plain decoding in one slot. Weights are random, of Qwen3.5-4B's shape.
Drafts are taken as often as the profile says; see `rehearsal`. One JSON line.
"""

import argparse
import time

import mlx.core as mx
from mlx_lm.models import qwen3_5
from mlx_lm.models.gated_delta import gated_delta_ops

from benchmarks.common import print_line, surroundings
from benchmarks.random_pair import HEAD_SCALE, randomise
from benchmarks.rehearsal import PROFILES, accept_length, rehearse
from benchmarks.throughput import mlx_lm_batch
from dspark_batch.drafters.dflash import read_dflash
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.engine.conformance import conformance
from dspark_batch.engine.engine import Engine
from dspark_batch.models.config_reader import ConfigReader
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.models.target import PairConfig, Target, ends_of
from dspark_batch.numerics.recurrence import gated_delta
from dspark_batch.pair import Pair
from dspark_batch.types import Item, Request

SIZES = {
    "4b": {
        "head_dim": 256,
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "vocab_size": 248320,
    },
    "toy": {
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 128,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
CONTEXT, PROMPT, BLOCK, DRAFT_LAYERS = 4096, 64, 16, 5
CHAIN, TIMES = 20, 5


def random_hybrid(size, dtype, seed=7):
    """Make a pair; returns it and the token [V] int32 that follows each token."""
    config = SIZES[size] | {
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": CONTEXT,
        "model_type": "qwen3_5",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    model_key, draft_key, order_key, decay_key = mx.random.split(mx.random.key(seed), 4)
    randomise(model, model_key, dtype, config["num_hidden_layers"])
    for layer in model.layers:
        if layer.is_linear:
            decay_key, own = mx.random.split(decay_key)
            mixer = layer.linear_attn
            mixer.A_log = mx.log(mx.random.uniform(0.1, 16, mixer.A_log.shape, key=own))
    follower = mx.random.permutation(config["vocab_size"], key=order_key).astype(mx.int32)
    text = model.language_model
    text.lm_head.weight = HEAD_SCALE * text.model.embed_tokens.weight[mx.argsort(follower)]
    read = ConfigReader(_drafter_config(config), "config.json")
    facts = Target(model).facts
    drafter = DSparkDrafter(read_dflash(read, facts), ends_of(model))
    randomise(drafter, draft_key, dtype, DRAFT_LAYERS)
    mx.eval(model.parameters(), drafter.parameters(), follower)
    make_rows_safe(model)
    make_rows_safe(drafter)
    name = str(dtype).removeprefix("mlx.core.")
    settled = PairConfig(None, name, CONTEXT, frozenset(), {"weights": "random"})
    return Pair(Target(model, drafter.tap_ids, settled), None, drafter, settled), follower


def _drafter_config(target):
    layers = target["num_hidden_layers"]
    return {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "block_size": BLOCK,
        "dflash_config": {
            "mask_token_id": target["vocab_size"] - 1,
            "target_layer_ids": [1, layers // 2, layers - 1],
        },
        "head_dim": 128,
        "hidden_size": target["hidden_size"],
        "intermediate_size": target["intermediate_size"],
        "max_position_embeddings": CONTEXT,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": DRAFT_LAYERS,
        "num_key_value_heads": 8,
        "num_target_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e7,
        "vocab_size": target["vocab_size"],
    }


def recurrence_us(run, size, slots, width, dtype):
    """Time one launch of a chain, in microseconds."""
    key_heads, heads = size["linear_num_key_heads"], size["linear_num_value_heads"]
    keys = mx.random.normal((slots, width, key_heads, size["linear_key_head_dim"])).astype(dtype)
    values = mx.random.normal((slots, width, heads, size["linear_value_head_dim"])).astype(dtype)
    keys = keys / mx.linalg.norm(keys.astype(mx.float32), axis=-1, keepdims=True).astype(dtype)
    gates = mx.full((slots, width, heads), 0.9, dtype=mx.float32)
    inputs = [keys, keys, values, gates, gates.astype(dtype)]
    mask = mx.ones((slots, width), dtype=mx.bool_)
    state = mx.zeros((slots, heads, values.shape[-1], keys.shape[-1]))
    mx.eval(inputs, state)
    best = float("inf")
    for _ in range(TIMES):
        began, last = time.perf_counter(), state
        for _ in range(CHAIN):
            _, last = run(inputs, last, mask)
        mx.eval(last)
        best = min(best, time.perf_counter() - began)
    return round(1e6 * best / CHAIN, 1)


def kernel_part(options, dtype):
    """Time the recurrence of one layer."""
    size, found = SIZES[options.size], {}
    for slots in options.slots:
        for width in (1, 8, 16, 256 if slots <= 8 else 32):
            found[f"{slots} slots, {width} tokens"] = {
                "us": recurrence_us(gated_delta, size, slots, width, dtype),
                "loop_us": recurrence_us(
                    lambda inputs, *more: gated_delta_ops(*inputs, *more), size, slots, width, dtype
                )
                if width <= 16
                else None,
            }
    return found


def requests(count, follower, max_tokens):
    """Make prompts that begin anywhere, and go on as the target would."""
    vocabulary, made = follower.shape[0], []
    following = follower.tolist()
    for index in range(count):
        ids = [(7919 * index + 13) % (vocabulary - 1)]
        while len(ids) < PROMPT // 2 + index % PROMPT:
            ids.append(following[ids[-1]])
        item = Item(index, str(index), f"{index:032x}", f"benchmark:{index}")
        made.append(Request(item, tuple(ids), max_tokens))
    return made


def answers(pair, work, **settings):
    """Answer the work; returns token ids by item, and tokens per second."""
    engine = Engine(
        pair, prefix_positions=0, **settings
    )  # or the second time would share the first
    list(engine.generate(work))  # the warm-up: a GPU compiles each shape that the work has
    began = time.perf_counter()
    done = {c.item.index: c.token_ids for c in engine.generate(work)}
    return done, sum(map(len, done.values())) / (time.perf_counter() - began)


def engine_part(options, dtype):
    """Answer plainly, with drafts, and by mlx-lm."""
    pair, follower = random_hybrid(options.size, dtype)
    profile = [*PROFILES[options.profile], *[PROFILES[options.profile][-1]] * BLOCK][: BLOCK - 1]
    rehearse(pair.drafter, follower, profile)
    began = time.perf_counter()
    found = conformance(pair.target)
    line = {
        "shapes": str(found.shapes),
        "divergence": found.divergence,
        "conformance_s": round(time.perf_counter() - began, 1),
        "accept_length_of_profile": round(accept_length(profile[: options.draft_length]), 2),
        "bytes": pair.target.cached_bytes(),
    }
    most = max(options.slots) * options.items_per_slot
    work = requests(most, follower, options.max_tokens)
    known, _ = answers(pair, work[: options.compared], slots=1, draft_length=0, shapes=found.shapes)
    for slots in options.slots:
        some = work[: slots * options.items_per_slot]
        shared = {"slots": slots, "shapes": found.shapes}
        active = mx.get_active_memory()
        plain, plain_s = answers(pair, some, draft_length=0, **shared)
        drafted, drafted_s = answers(pair, some, draft_length=options.draft_length, **shared)
        differ = [n for n, ids in known.items() if n in drafted and ids != drafted[n]]
        unlike = sum(plain[n] != drafted[n] for n in plain)
        mlx_lm_batch(pair, some, slots)
        began = time.perf_counter()
        others = mlx_lm_batch(pair, some, slots)
        seconds = time.perf_counter() - began
        line[f"{slots} slots"] = {
            "items": len(some),
            "plain": round(plain_s, 1),
            "drafts": round(drafted_s, 1),
            "mlx_lm": round(sum(map(len, others)) / seconds, 1),
            "differ_from_one_slot": len(differ),
            "plain_and_drafts_differ": unlike,
            "mlx_lm_differs": sum(plain[n] != tuple(ids) for n, ids in enumerate(others)),
            "active_gb": round((mx.get_active_memory() - active) / 1e9, 2),
            "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
        }
    return line


def main():
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="4b", choices=SIZES)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--items-per-slot", type=int, default=2)
    parser.add_argument("--compared", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=7)
    parser.add_argument("--profile", default="math", choices=PROFILES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", nargs="+", default=["kernel", "engine"])
    options = parser.parse_args()
    dtype = getattr(mx, options.dtype)
    parts = {"kernel": kernel_part, "engine": engine_part}
    found = {part: run(options, dtype) for part, run in parts.items() if part in options.parts}
    print_line({**surroundings(), **found})


if __name__ == "__main__":
    main()
