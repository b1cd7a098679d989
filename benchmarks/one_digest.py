"""One job, many starts: the same bytes each time.

    python -m benchmarks.one_digest [--runs 20] [--items 40] [--busy 4] [--blas auto bundled]

Each run answers 40 held-out items, half of them sampled, with an empty home: alone, beside busy
processes, with other `--slots` and `--draft-length`, or killed with SIGKILL and started again. The
digest is over all that an output holds but times and counts of rounds. One JSON line for each
BLAS; the exit code is 1 if a BLAS has several digests.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import held_out_records, print_line, surroundings

MAX_TOKENS = 48
BUSY = "while True: sum(i * i for i in range(10**6))"


def write_job(folder, items):
    lines = []
    for number, record in enumerate(held_out_records(items)):
        sampling = {"temperature": 0.9, "seed": number} if number % 2 else {}
        lines.append({"id": str(number), "prompt": record["prompt"], "sampling_params": sampling})
    Path(folder, "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def digest(out):
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        row.pop("metrics")
    kept = [{k: row[k] for k in sorted(row) if k != "created"} for row in rows]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def start(folder, blas, words):
    home = Path(folder, "home")
    environment = os.environ | {
        "HOME": str(home),
        "DSPARK_BATCH_CACHE": str(home / "cache"),
        "DSPARK_BATCH_BLAS": blas,
    }
    line = [sys.executable, "-m", "dspark_batch", "run", "in.jsonl", "-o", "out.jsonl", "-q"]
    line += ["--max-tokens", str(MAX_TOKENS), *words]
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = str(root)
    return subprocess.Popen(line, cwd=folder, env=environment)


def answered(folder):
    rows = Path(folder, "out.jsonl.run", "rows.jsonl")
    return rows.read_bytes().count(b"\n") if rows.exists() else 0


def run_once(way, blas, rng, options):
    """Run the job in one of the ways; return its digest and what was done."""
    with tempfile.TemporaryDirectory() as folder:
        write_job(folder, options.items)
        words, others = [], []
        if way == "other settings":
            words = ["--slots", str(rng.randint(1, 33)), "--draft-length", str(rng.randint(0, 7))]
        if way == "busy":
            others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
        try:
            process = start(folder, blas, words)
            if way == "killed":
                enough = rng.randint(1, max(1, options.items - 5))
                while process.poll() is None and answered(folder) < enough:
                    time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
                process.wait()
                words = [f"killed with {answered(folder)} rows"]
                process = start(folder, blas, [])
            if process.wait() != 0:
                raise SystemExit(f"{way} {words}: ended with {process.returncode}")
        finally:
            for other in others:
                other.kill()
        return digest(Path(folder, "out.jsonl")), f"{way} {' '.join(words)}".strip()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--busy", type=int, default=4)
    parser.add_argument("--blas", nargs="+", default=["auto", "bundled"])
    options = parser.parse_args()
    ways = ("alone", "busy", "other settings", "killed")
    is_one, results = True, []
    for blas in options.blas:
        rng, found = random.Random(7), {}
        for number in range(options.runs):
            name, done = run_once(ways[number % len(ways)], blas, rng, options)
            found.setdefault(name, []).append(done)
            print(name, done, file=sys.stderr, flush=True)
        is_one = is_one and len(found) == 1
        results.append({"blas": blas, "digests": found})
    print_line({"benchmark": "one_digest", **surroundings(), "results": results})
    if not is_one:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
