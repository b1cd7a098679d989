"""Conversations as token ids: whole, for generating, or packed into rows, for training a target."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from recipes.tiny.corpus import Conversation, draw_conversation
from recipes.tiny.tokenizer import END, load_tokenizer, opening


class Rows(NamedTuple):
    """R rows of packed conversations."""

    tokens: np.ndarray  # [R, T] uint16
    answers: np.ndarray  # [R, T] bool, tokens of an answer, its end marker included


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to where its last answer begins, as token ids."""

    ids: list[int]
    answer_len: int  # tokens of the corpus's own answer, the end marker included


def encode_prompt(tokenizer: Tokenizer, conversation: Conversation) -> Prompt:
    """Encode all turns but the last answer."""
    text = opening(conversation.system, conversation.turns[0].task.prompt)
    for before, turn in zip(conversation.turns, conversation.turns[1:], strict=False):
        text += f"{before.task.answer}{END}\n{opening(None, turn.task.prompt)}"
    answer = tokenizer.encode(conversation.turns[-1].task.answer + END).ids
    return Prompt(tokenizer.encode(text).ids, len(answer))


def _pieces(tokenizer: Tokenizer, conversation: Conversation) -> Iterator[tuple[list[int], bool]]:
    """Yield a whole conversation in runs of ids, each with whether it is an answer."""
    system = conversation.system
    for turn in conversation.turns:
        yield tokenizer.encode(opening(system, turn.task.prompt)).ids, False
        yield tokenizer.encode(turn.task.answer + END).ids, True
        yield tokenizer.encode("\n").ids, False
        system = None


def pack(tokenizer: Tokenizer, rng: Random, num_rows: int, row_len: int) -> Rows:
    """Fill rows with conversations, one after the other; each row begins with a new one."""
    rows = Rows(np.zeros((num_rows, row_len), np.uint16), np.zeros((num_rows, row_len), bool))
    for row in range(num_rows):
        used = 0
        while used < row_len:
            for ids, is_answer in _pieces(tokenizer, draw_conversation(rng)):
                ids = ids[: row_len - used]
                rows.tokens[row, used : used + len(ids)] = ids
                rows.answers[row, used : used + len(ids)] = is_answer
                used += len(ids)
    return rows


def packed_batches(
    directory: Path, seed: str, num_batches: int, num_rows: int, row_len: int
) -> Iterator[Rows]:
    """Yield batches of packed rows, made by other processes ahead of their use.

    Args:
        directory: where the tokenizer is.
        seed: decides every batch, whatever the number of processes.
        num_batches: batches in all.
        num_rows: rows in a batch.
        row_len: tokens in a row.
    """
    make = partial(_make_batch, seed=seed, num_rows=num_rows, row_len=row_len)
    workers = max(1, (os.cpu_count() or 2) - 2)
    # Processes are spawned: a forked one would inherit a GPU context that it must not use.
    with get_context("spawn").Pool(workers, _open_tokenizer, (directory,)) as pool:
        yield from pool.imap(make, range(num_batches))


_tokenizers: list[Tokenizer] = []  # one per worker process


def _open_tokenizer(directory: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizers[:] = [load_tokenizer(directory)]


def _make_batch(number: int, seed: str, num_rows: int, row_len: int) -> Rows:
    return pack(_tokenizers[0], Random(f"{seed}/{number}"), num_rows, row_len)
