"""Let a target answer prompts, many at once: data for its drafter, and answers to measure."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache

from recipes.tiny.rows import Prompt

CHECK_EVERY = 8  # steps between two questions to the device whether all rows have ended


def answer_all(
    model: nn.Module,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    stop_id: int,
    *,
    batch: int,
    seed: int,
) -> list[list[int]]:
    """Answer prompts in batches of about equally long answers.

    Args:
        model: the target.
        prompts: what to answer; an answer is cut when it grows far longer than the corpus's own.
        temperatures: one for each prompt; 0 is greedy.
        stop_id: the token that ends an answer.
        batch: rows at once.
        seed: of the sampling.

    Returns:
        Token ids for each prompt, the stop token included if it was reached.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].answer_len, len(prompts[i].ids)))
    key = mx.random.key(seed)
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        key, own = mx.random.split(key)
        limit = max(prompts[i].answer_len for i in chosen) * 5 // 4 + 16
        ids = [prompts[i].ids for i in chosen]
        warmth = mx.array([temperatures[i] for i in chosen])
        for i, answer in zip(chosen, _answer(model, ids, warmth, stop_id, limit, own), strict=True):
            answers[i] = answer
    return answers


def _answer(
    model: nn.Module,
    prompts: list[list[int]],
    temperatures: mx.array,
    stop_id: int,
    limit: int,
    key: mx.array,
) -> Iterator[list[int]]:
    """Answer one batch; yields up to `limit` ids for each row."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    tokens = mx.array([[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)])
    cache = [BatchKVCache(padding) for _ in model.layers]
    if width > 1:
        model(tokens[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache])
    last, ended, chosen = tokens[:, -1], mx.zeros(len(prompts), mx.bool_), []
    for step in range(limit):
        key, own = mx.random.split(key)
        logits = model(last[:, None], cache=cache)[:, -1].astype(mx.float32)
        last = _choose(logits, temperatures, own)
        ended = ended | (last == stop_id)
        chosen.append(last)
        mx.async_eval(last, ended)
        if step % CHECK_EVERY == CHECK_EVERY - 1 and ended.all().item():
            break
    for row in np.array(mx.stack(chosen, axis=1)).tolist():
        yield row[: row.index(stop_id) + 1] if stop_id in row else row


def _choose(logits: mx.array, temperatures: mx.array, key: mx.array) -> mx.array:
    """Choose a token for each row of logits [B, V]; temperature 0 is argmax."""
    warm = mx.where(temperatures > 0, temperatures, 1.0)[:, None]
    sampled = mx.random.categorical(logits / warm, key=key)
    return mx.where(temperatures > 0, sampled, mx.argmax(logits, axis=-1)).astype(mx.int32)
