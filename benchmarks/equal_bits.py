"""Whether logits and caches are equal bit for bit, whatever the shape of a step.

    [OPENBLAS_CORETYPE=Haswell] [OPENBLAS_NUM_THREADS=2] [DSPARK_BATCH_BLAS=bundled] \\
        python -m benchmarks.equal_bits [NAME...] [--slots 1 2 3] [--seed 1]

Runs `tests/properties/any_shape.py` on the BLAS that the environment chooses: the bundled pair, ten
odd sizes, two mixtures of experts, a window, hybrids; 1 to 64 slots by 1 to 16 tokens, prompts in
chunks and in pieces. One JSON line: how many sequences were compared for each target, and how
many differ. Exit 1 if any does.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "properties"))

import any_shape

from benchmarks.common import print_line, surroundings

SIZES = (
    *("72x3x1x41", "96x4x2x48", "100x7x7x50", "128x2x1x200", "160x5x5x96", "200x4x2x333"),
    *(
        "264x3x1x130",
        "320x5x1x640",
        "384x6x2x1024",
        "576x9x3x1536",
        "moe96x4x2x48",
        "moe160x5x1x75",
    ),
)
CASES = ("tiny", "gemma4_vanilla", "qwen35_dflash", "qwen35_moe_dflash")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*CASES, *SIZES])
    parser.add_argument("--slots", type=int, nargs="+", default=any_shape.SLOTS)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    told = {}
    for name in options.names:
        target = any_shape.target_of(name)
        bench = any_shape.Bench(target)
        differ = list(any_shape.differences(target, options.seed, options.slots, bench))
        told[name] = {"checks": bench.checks, "differ": differ}
        print(name, bench.checks, len(differ), file=sys.stderr, flush=True)
    print_line({"benchmark": "equal_bits", **surroundings(), "targets": told})
    if any(each["differ"] for each in told.values()):
        raise SystemExit("bits differ")


if __name__ == "__main__":
    main()
