"""How long a start takes: seconds until a job's first row, and until its end.

    python -m benchmarks.first_row [--starts 5] [--items 28]

Each start is a process of its own that answers the demo's prompts and writes rows as they finish.
The first one has an empty home; those behind it have what it kept. The package is compiled, as it
is once it is installed. One JSON line: the first start, and the median, least and most of the
others.
"""

import argparse
import compileall
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, print_line, spread, surroundings

PROMPTS = ROOT / "sample_inputs" / "prompts.jsonl"


def start(home, items):
    """Run the job once; return its rows, and its seconds to the first and the last of them."""
    folders = {"HOME": str(home), "DSPARK_BATCH_CACHE": str(home / "cache"), "TMPDIR": str(home)}
    environment = os.environ | folders | {"PYTHONPATH": str(ROOT)}
    words = ["run", str(PROMPTS), "-o", "-", "-q", "--limit", str(items)]
    words = [sys.executable, "-m", "dspark_batch", *words]
    began = time.perf_counter()
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        first = time.perf_counter() - began
        rows = 1 + len(process.stdout.readlines())
    if process.returncode or rows < items:
        raise SystemExit(f"a start gave {rows} rows and exit code {process.returncode}")
    return {"first_row_s": round(first, 2), "end_s": round(time.perf_counter() - began, 2)}


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--items", type=int, default=28)
    options = parser.parse_args()
    compileall.compile_dir(ROOT / "dspark_batch", quiet=1)
    with tempfile.TemporaryDirectory() as home:
        bare, *used = [start(Path(home), options.items) for _ in range(options.starts)]
    later = {name: spread([each[name] for each in used or [bare]]) for name in bare}
    found = {"items": options.items, "with_an_empty_home": bare, "later_starts": later}
    print_line({"benchmark": "first_row", **surroundings(), **found})


if __name__ == "__main__":
    main()
