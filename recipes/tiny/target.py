"""Train a target on packed conversations."""

import time
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.train.fit import Schedule, Trainer
from recipes.tiny.rows import Rows

PROMPT_WEIGHT = 0.1  # a prompt's tokens are data, not behaviour, but they teach the model to read
LOG_EVERY = 200


def train_target(model: nn.Module, batches: Iterable[Rows], schedule: Schedule) -> None:
    """Train in place, one step for each batch."""

    def loss(tokens: mx.array, answers: mx.array) -> tuple[mx.array, ...]:
        return language_loss(model(tokens[:, :-1]), tokens[:, 1:], answers[:, 1:])

    trainer, start = Trainer(model, loss, schedule), time.perf_counter()
    for number, rows in enumerate(batches, 1):
        tokens = mx.array(rows.tokens).astype(mx.int32)
        values = trainer.step(tokens, mx.array(rows.answers))
        if number % LOG_EVERY == 0 or number == schedule.steps:
            _log(number, values, tokens.size, time.perf_counter() - start)
    trainer.finish()


def language_loss(
    logits: mx.array, labels: mx.array, answers: mx.array
) -> tuple[mx.array, mx.array]:
    """Average the cross entropy, prompts weighing less than answers.

    Args:
        logits: [B, T, V].
        labels: [B, T], the tokens that follow.
        answers: [B, T] bool, labels that belong to an answer.

    Returns:
        The loss, and the mean cross entropy of answers alone.
    """
    entropy = nn.losses.cross_entropy(logits.astype(mx.float32), labels)
    weight = mx.where(answers, 1.0, PROMPT_WEIGHT)
    return (entropy * weight).sum() / weight.sum(), (entropy * answers).sum() / answers.sum()


def _log(number: int, values: tuple[mx.array, ...], tokens: int, elapsed_s: float) -> None:
    loss, answer_loss = (value.item() for value in values)
    speed = number * tokens / elapsed_s
    print(
        f"target step {number} loss {loss:.4f} answers {answer_loss:.4f} "
        f"{speed:.0f} tokens/s {elapsed_s:.0f} s",
        flush=True,
    )
