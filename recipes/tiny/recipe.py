"""The bundled pair from nothing: `python -m recipes.tiny.recipe --out DIR`.

Five stages, each from the files of those before: tokenizer, target, regenerate, drafter, twin.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from dspark_batch.train.fit import Schedule, initialize
from dspark_batch.train.learn import drafting_loss, freeze_ends
from dspark_batch.train.loss import DFLASH, DSPARK, LossMix
from dspark_batch.train.measure import Sample, measure
from dspark_batch.train.teacher import Ends, TappedTarget
from recipes.tiny.answers import answer_batches, load_answers, save_answers
from recipes.tiny.checkpoint import (
    load_drafter,
    load_target,
    new_drafter,
    new_target,
    read_json,
    save_model,
    write_json,
)
from recipes.tiny.corpus import Conversation, conversations, held_out_turns
from recipes.tiny.drafter import train_drafter
from recipes.tiny.regenerate import answer_all
from recipes.tiny.rows import encode_prompt, packed_batches
from recipes.tiny.target import train_target
from recipes.tiny.tokenizer import (
    END,
    load_tokenizer,
    opening,
    save_tokenizer,
    train_tokenizer,
)

SEED = 2026
HELD_OUT_SEED = f"{SEED}/held-out"
NUM_ANCHORS = 16  # blocks per answer and step
TEMPERATURES = (0.0, 0.0, 0.7, 1.0)  # of regenerated answers, in turns
MAX_POSITIONS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the pair is and how long it trains."""

    vocab: int = 1536  # the last row is the mask token, unknown to the tokenizer
    hidden: int = 320
    layers: int = 6
    target_mlp: int = 768
    drafter_layers: int = 2  # with one, drafts are cheaper, but too many are rejected
    drafter_mlp: int = 512
    markov_rank: int = 64
    texts: int = 20_000  # conversations that the tokenizer learns from
    target_steps: int = 14_000
    rows: int = 32  # packed rows in a step
    row_len: int = 1_025
    regenerated: int = 131_072  # answers
    drafter_steps: int = 7_000
    drafter_tokens: int = 16_384  # tokens of context in a step
    generate_batch: int = 1_024
    held_out_per_kind: int = 40


FULL = Sizes()
TOY = Sizes(
    vocab=640, hidden=64, layers=4, target_mlp=128, drafter_mlp=96, markov_rank=8, texts=300,
    target_steps=30, rows=4, row_len=257, regenerated=64, drafter_steps=25, drafter_tokens=1_024,
    generate_batch=32, held_out_per_kind=1,
)  # fmt: skip


def target_config(sizes: Sizes) -> dict[str, Any]:
    """Describe the target as transformers 5 does."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.target_mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * sizes.layers,
        "max_window_layers": sizes.layers,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def drafter_config(target: Mapping[str, Any], sizes: Sizes, *, dflash: bool) -> dict[str, Any]:
    """Describe a drafter for a target, as DeepSpec does: the target's config, changed."""
    layers = target["num_hidden_layers"]
    config = dict(target) | {
        "architectures": ["Qwen3DSparkModel"],
        "num_hidden_layers": sizes.drafter_layers,
        "layer_types": ["full_attention"] * sizes.drafter_layers,
        "intermediate_size": sizes.drafter_mlp,
        "tie_word_embeddings": False,
        "block_size": 7,
        "num_target_layers": layers,
        "target_layer_ids": [0, layers // 2 - 1, layers - 2],
        "mask_token_id": target["vocab_size"] - 1,
        "num_anchors": NUM_ANCHORS,
        "markov_rank": 0 if dflash else sizes.markov_rank,
        "enable_confidence_head": not dflash,
    }
    if not dflash:
        config |= {"markov_head_type": "vanilla", "confidence_head_with_markov": True}
    return config


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the stages leave their files."""

    out: Path

    @property
    def target(self) -> Path:
        """The target with its tokenizer."""
        return self.out / "target"

    @property
    def drafter(self) -> Path:
        """The DSpark drafter."""
        return self.out / "drafter"

    @property
    def twin(self) -> Path:
        """The DFlash twin, for the comparison."""
        return self.out / "twin"

    @property
    def answers(self) -> Path:
        """What the target answered to training prompts."""
        return self.out / "answers.npz"

    @property
    def report(self) -> Path:
        """What was measured."""
        return self.out / "report.json"


def make_tokenizer(paths: Paths, sizes: Sizes) -> None:
    """Train the tokenizer on the beginning of the corpus."""
    paths.target.mkdir(parents=True, exist_ok=True)
    source = conversations(f"{SEED}/tokenizer")
    texts = (_text(conversation) for conversation, _ in zip(source, range(sizes.texts)))  # noqa: B905
    save_tokenizer(train_tokenizer(texts, sizes.vocab - 1), paths.target, MAX_POSITIONS)


def _text(conversation: Conversation) -> str:
    parts = [conversation.system or ""]
    parts += [f"{turn.task.prompt}\n{turn.task.answer}" for turn in conversation.turns]
    return "\n".join(parts)


def make_target(paths: Paths, sizes: Sizes) -> None:
    """Train the target and measure it on held-out tasks."""
    config = target_config(sizes)
    model = new_target(config)
    initialize(model, mx.random.key(SEED))
    schedule = Schedule(steps=sizes.target_steps, peak_lr=2e-3, warmup=sizes.target_steps // 30,
                        beta2=0.98)  # fmt: skip
    batches = packed_batches(
        paths.target, f"{SEED}/target", sizes.target_steps, sizes.rows, sizes.row_len
    )
    train_target(model, batches, schedule)
    save_model(model, config, paths.target)
    generation = {"do_sample": False, "eos_token_id": [2], "pad_token_id": 0}
    write_json(generation, paths.target / "generation_config.json")
    _report(paths, "exact_match", exact_match(paths, sizes))


def exact_match(paths: Paths, sizes: Sizes) -> dict[str, float]:
    """Measure the share of held-out answers that are right to the letter, by kind and over all."""
    tokenizer = load_tokenizer(paths.target)
    turns = held_out_turns(HELD_OUT_SEED, sizes.held_out_per_kind)
    turns = [turn for turn in turns if turn.task.exact]
    right, total = Counter(), Counter()
    for turn, ids in zip(turns, _held_out_answers(paths, sizes, turns), strict=True):
        answer = tokenizer.decode(ids, skip_special_tokens=False)
        right[turn.kind] += answer == turn.task.answer + END
        total[turn.kind] += 1
    shares = {kind: round(right[kind] / total[kind], 4) for kind in sorted(total)}
    return {"all": round(sum(right.values()) / sum(total.values()), 4), **shares}


def _held_out_answers(paths: Paths, sizes: Sizes, turns: list) -> list[list[int]]:
    tokenizer, model = load_tokenizer(paths.target), load_target(paths.target)
    prompts = [encode_prompt(tokenizer, Conversation(None, (turn,))) for turn in turns]
    stop, cold = tokenizer.token_to_id(END), [0.0] * len(prompts)
    return answer_all(model, prompts, cold, stop, batch=sizes.generate_batch, seed=SEED)


def regenerate(paths: Paths, sizes: Sizes) -> None:
    """Let the target answer training prompts, greedily and sampled."""
    tokenizer, model = load_tokenizer(paths.target), load_target(paths.target)
    source = conversations(f"{SEED}/regenerate")
    prompts = [encode_prompt(tokenizer, next(source)) for _ in range(sizes.regenerated)]
    heat = [TEMPERATURES[i % len(TEMPERATURES)] for i in range(len(prompts))]
    stop = tokenizer.token_to_id(END)
    answers = answer_all(model, prompts, heat, stop, batch=sizes.generate_batch, seed=SEED)
    pairs = [(prompt.ids, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    save_answers(pairs, paths.answers)


def make_drafter(paths: Paths, sizes: Sizes) -> None:
    """Train the DSpark drafter and measure it."""
    _make_drafter(paths, sizes, paths.drafter, DSPARK)


def make_twin(paths: Paths, sizes: Sizes) -> None:
    """Train the DFlash twin, same data and steps, and measure it."""
    _make_drafter(paths, sizes, paths.twin, DFLASH)


def _make_drafter(paths: Paths, sizes: Sizes, directory: Path, mix: LossMix) -> None:
    base = read_json(paths.target / "config.json")
    config = drafter_config(base, sizes, dflash=mix is DFLASH)
    drafter, model = new_drafter(config), load_target(paths.target)
    initialize(drafter, mx.random.key(SEED))
    embedding = model.model.embed_tokens.weight
    freeze_ends(drafter, Ends(embedding, embedding))
    target = TappedTarget(model, drafter.config.target_layer_ids)
    schedule = Schedule(steps=sizes.drafter_steps, peak_lr=2e-3, warmup=sizes.drafter_steps // 25)
    pairs = load_answers(paths.answers)
    batches = answer_batches(pairs, sizes.drafter_steps, sizes.drafter_tokens, SEED)
    loss = drafting_loss(drafter, target, mix, lambda width: NUM_ANCHORS)
    train_drafter(drafter, loss, batches, schedule)
    save_model(drafter, config, directory)
    _report(paths, directory.name, accept_lengths(paths, sizes, directory))


def accept_lengths(paths: Paths, sizes: Sizes, directory: Path) -> dict[str, Any]:
    """Measure a drafter on the target's greedy answers to held-out tasks."""
    tokenizer = load_tokenizer(paths.target)
    turns = held_out_turns(HELD_OUT_SEED, sizes.held_out_per_kind)
    answers = _held_out_answers(paths, sizes, turns)
    samples = [
        Sample(turn.kind, tokenizer.encode(opening(None, turn.task.prompt)).ids, answer)
        for turn, answer in zip(turns, answers, strict=True)
    ]
    drafter = load_drafter(directory)
    target = TappedTarget(load_target(paths.target), drafter.config.target_layer_ids)
    return measure(drafter, target, samples, batch=sizes.generate_batch // 8)


def _report(paths: Paths, name: str, content: object) -> None:
    report = read_json(paths.report) if paths.report.exists() else {}
    write_json(report | {name: content}, paths.report)
    print(name, content, flush=True)


STAGES: dict[str, Callable[[Paths, Sizes], None]] = {
    "tokenizer": make_tokenizer,
    "target": make_target,
    "regenerate": regenerate,
    "drafter": make_drafter,
    "twin": make_twin,
}


def main() -> None:
    """Run the stages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for all files")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--toy", action="store_true", help="minutes on a CPU; learns little")
    arguments = parser.parse_args()
    for stage in arguments.stages:
        start = time.perf_counter()
        STAGES[stage](Paths(arguments.out), TOY if arguments.toy else FULL)
        print(f"{stage}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
