"""A target's own answers on disk, and as batches for a drafter's training."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dspark_batch.train.batches import Pair, choose, padded
from dspark_batch.train.blocks import Answers

MIN_ANSWER_LEN = 14  # shorter ones teach little (DeepSpec drops them too)
MOST_TOKENS = 768  # of a prompt with its answer; longer ones are dropped


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
    pairs: Sequence[Pair], num_batches: int, tokens_per_batch: int, seed: int
) -> Iterator[Answers]:
    """Yield batches of pairs of about the same length, shuffled anew for every pass."""
    fit = [
        (prompt, answer)
        for prompt, answer in pairs
        if len(answer) >= MIN_ANSWER_LEN and len(prompt) + len(answer) <= MOST_TOKENS
    ]
    lengths = [len(prompt) + len(answer) for prompt, answer in fit]
    for _, rows, width in choose(lengths, num_batches, tokens_per_batch, seed):
        yield padded([fit[row] for row in rows], width)
