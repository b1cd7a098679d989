"""A drafter that drafts only the tokens that its target's answers are made of.

What a drafter costs is its head, most of all: a product with a row for every token, and a Markov
bias as wide for every draft. Most of a vocabulary hardly ever occurs. Beside the tensors of
DeepSpec's packaging, which stay whole, a file names the tokens that are worth drafting:

    draft_tokens.json     [0, 1, 2, 5, ...]     rising ids

Other programs draft from all tokens. No answer depends on it: drafts are verified.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson

from dspark_batch.drafters.drafter_config import DrafterConfig
from dspark_batch.errors import ModelError

DRAFT_TOKENS = "draft_tokens.json"
HEADS = ("lm_head.", "markov_head.markov_w2.")  # tensors with a row for each token

_LEFT_OUT, _MOST_UNKNOWN = 1e-3, 1e-2  # shares of all tokens of answers
_MULTIPLE = 128  # products with a row less take longer on a GPU


def draft_tokens(directory: Path, vocab_size: int) -> list[int] | None:
    """Read which tokens a drafter drafts; None: all.

    Raises:
        ModelError: the file cannot be read, is damaged, or names tokens that the vocabulary lacks.
    """
    path = directory / DRAFT_TOKENS
    if not path.exists():
        return None
    try:
        ids: Any = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}). Delete it to draft from all tokens."
        ) from error
    except orjson.JSONDecodeError as error:
        raise ModelError(
            f"{path}: not JSON ({error}). Delete it to draft from all tokens."
        ) from error
    whole = isinstance(ids, list) and ids and all(type(i) is int for i in ids)
    if not (
        whole and all(a < b for a, b in pairwise(ids)) and ids[0] >= 0 and ids[-1] < vocab_size
    ):
        raise ModelError(
            f"{path}: expected a list of rising token ids from 0 to {vocab_size - 1}. Delete it to "
            "draft from all tokens."
        )
    return ids


def reduced(
    config: DrafterConfig, weights: Mapping[str, mx.array], ids: Sequence[int]
) -> tuple[DrafterConfig, dict[str, mx.array]]:
    """Keep the rows of a head that belong to some tokens, and make a table of these.

    Args:
        config: of the whole drafter.
        weights: its tensors, whole; a quantised head's scales are rows too.
        ids: the tokens, rising.
    """
    rows, own = mx.array(list(ids)), dict(weights)
    if config.tied:
        ends = {name: array for name, array in own.items() if name.startswith("embed_tokens.")}
        own |= {name.replace("embed_tokens.", "lm_head."): array for name, array in ends.items()}
    own |= {name: array[rows] for name, array in own.items() if name.startswith(HEADS)}
    own["d2t"] = rows.astype(mx.int64) - mx.arange(len(ids))
    return replace(config, draft_vocab_size=len(ids), own_head=True, tied=False), own


def worth_drafting(counts: np.ndarray, known: Sequence[int] = ()) -> list[int] | None:
    """Choose the most frequent tokens, until the rest is one in a thousand, at most half of all.

    Those that are known stay, also where they are more. Half is rounded down, so a vocabulary of
    fewer than 256 tokens is drafted whole.

    None, all tokens, where half leaves one in a hundred out, and where answers are so few that one
    in a hundred tokens of further ones would be unknown, by the share of those that occur once
    (Good and Turing's estimate).

    Args:
        counts: [V], how often each token of a vocabulary occurs in answers.
        known: tokens that are chosen in any case.
    """
    whole = counts.sum()
    often = counts.astype(np.float64)
    often[list(known)] = np.inf
    frequent = np.argsort(-often, kind="stable")
    reached = np.cumsum(counts[frequent]) >= (1 - _LEFT_OUT) * whole
    least, half = int(reached.argmax()) + 1, counts.size // 2 // _MULTIPLE * _MULTIPLE
    size = max(min(_filled_up(least), half), _filled_up(len(known)))
    left_out = whole - counts[frequent[:size]].sum()
    if max(left_out, (counts == 1).sum()) >= _MOST_UNKNOWN * whole:
        return None
    ids: list[int] = np.sort(frequent[:size]).tolist()
    return ids


def _filled_up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE
