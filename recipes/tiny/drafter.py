"""Train a drafter on the answers of the recipe's own target."""

import time
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.train.blocks import Answers
from dspark_batch.train.fit import Loss, Schedule, Trainer
from dspark_batch.train.loss import Terms

LOG_EVERY = 200


def train_drafter(
    drafter: nn.Module, loss: Loss, batches: Iterable[Answers], schedule: Schedule
) -> None:
    """Train in place, one step for each batch; anchors are drawn anew every time."""
    trainer, start = Trainer(drafter, loss, schedule), time.perf_counter()
    for number, batch in enumerate(batches, 1):
        values = trainer.step(batch.tokens, batch.answers, schedule.key(number))
        if number % LOG_EVERY == 0 or number == schedule.steps:
            _log(number, values, time.perf_counter() - start)
    trainer.finish()


def _log(number: int, values: tuple[mx.array, ...], elapsed_s: float) -> None:
    terms = Terms(*(value.item() for value in values))
    print(
        f"drafter step {number} loss {terms.loss:.4f} cross entropy {terms.cross_entropy:.4f} "
        f"L1 {terms.distance:.4f} confidence {terms.doubt:.4f} {elapsed_s:.0f} s",
        flush=True,
    )
