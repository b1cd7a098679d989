"""The process of one engine: python -m benchmarks.peers.contestant NAME.

It runs in the engine's own environment, so it imports only the standard library, our BLAS loader,
which needs nothing, and `benchmarks.peers.engines.NAME`, which imports the engine.
"""

import os
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from benchmarks.peers.protocol import serve
from dspark_batch import blas  # before MLX: it loads OpenBLAS for all engines in one way

PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "vllm-mlx", "mlx-dspark", "transformers")


class Contestant:
    """An engine, and when it was last at work."""

    def __init__(self, name):
        self._engine = import_module(f"benchmarks.peers.engines.{name}")
        self._answer = None
        self._idle_since = time.process_time()

    def load(self, **what):
        """Load the models; say what runs."""
        self._answer = self._engine.load(**what)
        self._idle_since = time.process_time()
        return {"versions": _versions(), "blas": blas.identity()}

    def go(self, setting, prompts, max_tokens):
        """Answer all prompts; say how long it took by the wall and by the processor."""
        wall, processor = time.perf_counter(), time.process_time()
        ids = self._answer(prompts, max_tokens, **setting)
        ended = time.process_time()
        reply = {
            "wall_s": time.perf_counter() - wall,
            "processor_s": ended - processor,
            "idle_s": processor - self._idle_since,
            "ids": [list(map(int, answer)) for answer in ids],
        }
        self._idle_since = time.process_time()
        return reply


def _versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main():
    """Serve the race; what libraries print goes to the log."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contestant = Contestant(sys.argv[1])
    serve(sys.stdin, replies, {"load": contestant.load, "go": contestant.go})


if __name__ == "__main__":
    main()
