"""A target's own answers on disk, and as batches for a drafter's training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np

from recipes.tiny.drafter import Answers

MIN_ANSWER_LEN = 14  # shorter ones teach little (DeepSpec drops them too)
BUCKETS = (192, 256, 384, 512, 768)  # lengths that rows are padded to; longer ones are dropped

Pair = tuple[list[int], list[int]]  # a prompt's ids and its answer's


def save_answers(pairs: Sequence[Pair], path: Path) -> None:
    """Write pairs as three flat arrays."""
    flat = [token for prompt, answer in pairs for token in (*prompt, *answer)]
    np.savez_compressed(
        path,
        tokens=np.array(flat, np.uint32),
        prompt_len=np.array([len(prompt) for prompt, _ in pairs], np.int32),
        answer_len=np.array([len(answer) for _, answer in pairs], np.int32),
    )


def load_answers(path: Path) -> list[Pair]:
    """Read what `save_answers` wrote."""
    with np.load(path, allow_pickle=False) as file:
        tokens, lengths = file["tokens"].tolist(), (file["prompt_len"], file["answer_len"])
    pairs, at = [], 0
    for prompt_len, answer_len in zip(*(each.tolist() for each in lengths), strict=True):
        middle, end = at + prompt_len, at + prompt_len + answer_len
        pairs.append((tokens[at:middle], tokens[middle:end]))
        at = end
    return pairs


def answer_batches(
    pairs: Sequence[Pair], num_batches: int, tokens_per_batch: int, seed: str
) -> Iterator[Answers]:
    """Yield batches of pairs of about the same length, shuffled anew for every pass."""
    rng, made = Random(seed), 0
    buckets = _sort_into_buckets(pairs)
    while True:
        for chosen, length in _one_pass(buckets, tokens_per_batch, rng):
            if made == num_batches:
                return
            made += 1
            yield _pad(chosen, length)


def _sort_into_buckets(pairs: Sequence[Pair]) -> dict[int, list[Pair]]:
    buckets: dict[int, list[Pair]] = {length: [] for length in BUCKETS}
    for prompt, answer in pairs:
        total = len(prompt) + len(answer)
        if len(answer) >= MIN_ANSWER_LEN and total <= BUCKETS[-1]:
            buckets[next(length for length in BUCKETS if total <= length)].append((prompt, answer))
    return buckets


def _one_pass(
    buckets: dict[int, list[Pair]], tokens_per_batch: int, rng: Random
) -> list[tuple[list[Pair], int]]:
    """Cut the buckets into batches, in random order; a bucket's incomplete batch is left out."""
    batches = []
    for length, pairs in buckets.items():
        size = max(1, tokens_per_batch // length)
        rng.shuffle(pairs)
        cuts = range(0, len(pairs) - size + 1, size)
        batches += [(pairs[cut : cut + size], length) for cut in cuts]
    if not batches:
        raise ValueError(f"no bucket of {sorted(buckets)} fills a batch of {tokens_per_batch}")
    rng.shuffle(batches)
    return batches


def _pad(pairs: Sequence[Pair], length: int) -> Answers:
    tokens, answers = np.zeros((len(pairs), length), np.int32), np.zeros((len(pairs), length), bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens[row, :end] = prompt + answer
        answers[row, len(prompt) : end] = True
    return Answers(mx.array(tokens), mx.array(answers))
