"""Start `driver.py` and watch its journal grow."""

import json
import subprocess
import sys
import time
from pathlib import Path

DRIVER = Path(__file__).with_name("driver.py")


def spawn(folder, *, pause_s=0.0, largest_file=None, **options):
    spec = {"inputs": [str(folder / "in.jsonl")], "out": str(folder / "out.jsonl")} | options
    job = {"spec": spec, "pause_s": pause_s, "largest_file": largest_file}
    return subprocess.Popen([sys.executable, DRIVER, json.dumps(job)], stderr=subprocess.PIPE)


def wait_for_bytes(path, size, process):
    """Wait until a file is that long; fail if the process ends before."""
    deadline = time.monotonic() + 100
    while not (path.exists() and path.stat().st_size >= size):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{path} did not reach {size} bytes: {process.communicate()[1]}")
        time.sleep(0.001)
