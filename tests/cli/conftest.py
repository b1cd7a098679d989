"""Ticks as a run makes them, and a clock that a test moves."""

import pytest

from dspark_batch.output.report import Tick
from dspark_batch.types import Completion, Failure, Item


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_tick():
    """Begin a stage; `tick.after(outcome)` counts one more row."""

    def make(stage="decode", *, total=1000, done=0, failed=0, resumed=0):
        return Tick(stage, total, done, failed, resumed)

    return make


@pytest.fixture
def answer():
    """A completion of 10 tokens: one from prefill, 9 from 3 rounds."""
    return Completion(
        ITEM,
        text="answer",
        token_ids=tuple(range(10)),
        finish_reason="stop",
        prompt_tokens=3,
        accept_lengths=(4, 4, 1),
        num_accepted=(3, 3, 0),
        num_drafted=(4, 4, 4),
    )


@pytest.fixture
def failure():
    return Failure(ITEM, "bad_record", "in.jsonl:1: not JSON")


ITEM = Item(0, "0", "00", "in.jsonl:1")
