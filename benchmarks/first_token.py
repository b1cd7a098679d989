"""How long a pair takes until its first token: a pair with random weights, compiled as it starts.

    python -m benchmarks.first_token [--pair 4b] [--slots 64] [--starts 2]

Each start is a process of its own; the first one has an empty home and no kernels that were
compiled before, those behind it have what it kept. `set_up_s` is from the loaded pair to the
engine, `first_token_s` from the loaded pair to the first tokens that the host has.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import dspark_batch  # noqa: F401  the BLAS, before MLX
from benchmarks.common import ROOT, print_line, surroundings
from benchmarks.random_pair import random_pair
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.types import Item, Request


def one_start(name, slots):
    """Make a pair, set it up, and answer until something is committed."""
    pair, _ = random_pair(name)
    began = time.perf_counter()
    setup = set_up(pair)
    settings = {"shapes": setup.shapes, "lengths": setup.lengths, "costs": setup.costs}
    engine = Engine(pair, slots=slots, **settings)
    set_up_s = time.perf_counter() - began
    items = [Item(n, str(n), f"{n:032x}", f"benchmark:{n}") for n in range(slots)]
    for item in items:
        engine.add(Request(item, tuple(range(1, 101)), 64))
    while engine.so_far(items[0]) is None:
        engine.step()
    return {
        "set_up_s": round(set_up_s, 2),
        "first_token_s": round(time.perf_counter() - began, 2),
    }


def in_a_process(options, home):
    """Let one start happen with what a folder keeps."""
    folders = dict.fromkeys(("HOME", "TMPDIR", "DSPARK_BATCH_CACHE", "CUDA_CACHE_PATH"), home)
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = ["--pair", options.pair, "--slots", str(options.slots), "--starts", "0"]
    said = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_token", *words],
        env=os.environ | folders | {"PYTHONPATH": places},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(said.stdout)


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="4b", choices=("4b", "toy"))
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--starts", type=int, default=2, help="0: one, in this process")
    options = parser.parse_args()
    if options.starts == 0:
        print(json.dumps(one_start(options.pair, options.slots)))
        return
    with tempfile.TemporaryDirectory() as home:
        starts = [in_a_process(options, home) for _ in range(options.starts)]
    found = {"pair": options.pair, "slots": options.slots, "starts": starts}
    print_line({"benchmark": "first_token", **surroundings(), **found})


if __name__ == "__main__":
    main()
