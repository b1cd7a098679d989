"""The bundled pair's corpus: seeded conversations over `tasks`, and their split into two sides.

A task's side depends on a digest of its content alone, so a held-out task cannot occur in training
under any seed, wording, system prompt or turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

from recipes.tiny.systems import draw_system_prompt
from recipes.tiny.tasks import KINDS, Task

HELD_OUT_ONE_IN = 16
TURN_SHARE = 0.2  # chance that a conversation goes on after a turn


@dataclass(frozen=True, slots=True)
class Turn:
    """A task inside a conversation."""

    kind: str
    task: Task


@dataclass(frozen=True, slots=True)
class Conversation:
    """One or more turns under an optional system prompt."""

    system: str | None
    turns: tuple[Turn, ...]


def is_held_out(kind: str, content: str) -> bool:
    """Tell the side of a task: held out for measuring, or training."""
    digest = blake2b(f"{kind}|{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw_turn(rng: Random, kind: str, *, held_out: bool) -> Turn:
    """Draw a task of one kind from one side."""
    while True:
        task = KINDS[kind](rng)
        if is_held_out(kind, task.content) == held_out:
            return Turn(kind, task)


def draw_conversation(rng: Random) -> Conversation:
    """Draw a training conversation, every kind equally often."""
    kinds = list(KINDS)
    turns = [draw_turn(rng, rng.choice(kinds), held_out=False)]
    while rng.random() < TURN_SHARE:
        turns.append(draw_turn(rng, rng.choice(kinds), held_out=False))
    return Conversation(draw_system_prompt(rng), tuple(turns))


def conversations(seed: str) -> Iterator[Conversation]:
    """Yield training conversations without end; the seed decides all of them."""
    rng = Random(seed)
    while True:
        yield draw_conversation(rng)


def held_out_turns(seed: str, per_kind: int) -> list[Turn]:
    """Draw held-out tasks, the kinds in turns."""
    rng = Random(seed)
    return [draw_turn(rng, kind, held_out=True) for _ in range(per_kind) for kind in sorted(KINDS)]
