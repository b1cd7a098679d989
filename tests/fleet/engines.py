"""What workers of tests load: fake engines that can be told how to die."""

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fakes import FakeSteps, fake_baseline, fake_decode, fake_render, fake_steps_opener, unsplit

from dspark_batch.fleet.opener import Words, open_fleet
from dspark_batch.types import Gauge

WORDS = Words(fake_render, unsplit, fake_decode, frozenset())
PIDS = "pids"  # of workers, in the order in which they loaded; a line each


@dataclass
class Mortal(FakeSteps):
    """Dies as a process does, or runs out of memory."""

    kills: str | None = None  # a text in the prompt of an item that has a slot
    fits: int = 1 << 30  # slots; with more it runs out of memory

    def step(self):
        said = ["".join(map(chr, request.prompt_ids)) for request, *_ in self._active]
        if self.kills is not None and any(self.kills in each for each in said):
            os._exit(9)
        if len(self._active) > self.fits:
            raise RuntimeError("[metal::malloc] Unable to allocate 99 bytes.")
        return super().step()


def open_mortal(spec, begun, num_items, *, folder, numerics=("n0",), **settings):
    """Open a fake engine in a worker, and tell its process; the nth one has the nth numerics."""
    engine = Mortal(spec.slots, **settings)
    opened = fake_steps_opener(engine)()
    with (folder / PIDS).open("a") as file:
        file.write(f"{os.getpid()}\n")
    own = numerics[_number(folder) % len(numerics)]
    identity = opened.identity | {"numerics": own}
    return opened._replace(
        identity=identity, gauge=partial(_gauge, engine), baseline=fake_baseline()
    )


def _gauge(engine):
    return Gauge(1.0, engine.slots, 0, 0, 0.0, 0.0)


def _number(folder):
    """Count those who have come before."""
    for number in range(1000):
        with suppress(FileExistsError):
            Path(folder, f"came-{number}").mkdir()
            return number
    raise AssertionError("too many workers")


def pids(folder):
    """The processes of workers that have loaded."""
    return [int(line) for line in (folder / PIDS).read_text().splitlines()]


def fake_fleet(folder, **settings):
    """Make an `open_engine` whose workers are real processes with fake engines."""
    return partial(
        open_fleet, there=partial(open_mortal, folder=folder, **settings), words=lambda spec: WORDS
    )
