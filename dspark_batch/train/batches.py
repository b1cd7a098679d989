"""Which answers a step learns from: a function of the seed and the number of the step."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from dspark_batch.train.blocks import Answers

_LEAST_WIDTH = 64

Ids: TypeAlias = "Sequence[int] | np.ndarray"
Pair: TypeAlias = tuple[Ids, Ids]  # a prompt's ids and its answer's


class Chosen(NamedTuple):
    """What one step reads."""

    step: int  # from 1
    rows: tuple[int, ...]  # which answers
    width: int  # positions that each of them is padded to


def width_of(length: int) -> int:
    """Round a length up to 64, 96, 128, 192, ...: few widths, since a GPU compiles for each."""
    width = _LEAST_WIDTH
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


def choose(
    lengths: Sequence[int], steps: int, tokens_per_step: int, seed: int, after: int = 0
) -> Iterator[Chosen]:
    """Choose answers of about the same length for each step, in a new order for every pass.

    Args:
        lengths: of all answers with their prompts; none is longer than `tokens_per_step`.
        steps: in all.
        tokens_per_step: padding included.
        seed: decides every order.
        after: begin behind this step.
    """
    buckets: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        buckets.setdefault(min(width_of(length), tokens_per_step), []).append(row)
    step, number = 0, 0
    while True:
        for rows, width in _one_pass(buckets, tokens_per_step, Random(f"{seed}/{number}")):
            step += 1
            if step > steps:
                return
            if step > after:
                yield Chosen(step, rows, width)
        number += 1


def steps_of_a_pass(lengths: Sequence[int], tokens_per_step: int) -> int:
    """Count the steps in which every answer is read once."""
    sizes: dict[int, int] = {}
    for length in lengths:
        width = min(width_of(length), tokens_per_step)
        sizes[width] = sizes.get(width, 0) + 1
    return sum(-(-count // (tokens_per_step // width)) for width, count in sizes.items())


def _one_pass(
    buckets: dict[int, list[int]], tokens_per_step: int, rng: Random
) -> list[tuple[tuple[int, ...], int]]:
    """Cut the buckets into batches, in random order; a last one is filled from its bucket."""
    batches = []
    for width, bucket in sorted(buckets.items()):
        rows, size = rng.sample(bucket, len(bucket)), tokens_per_step // width
        rows += rng.choices(bucket, k=-len(rows) % size)
        batches += [(tuple(rows[at : at + size]), width) for at in range(0, len(rows), size)]
    rng.shuffle(batches)
    return batches


def padded(pairs: Sequence[Pair], width: int) -> Answers:
    """Lay prompts and their answers out in rows of the same width."""
    tokens, answers = np.zeros((len(pairs), width), np.int32), np.zeros((len(pairs), width), bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : end] = answer
        answers[row, len(prompt) : end] = True
    return Answers(mx.array(tokens), mx.array(answers))
