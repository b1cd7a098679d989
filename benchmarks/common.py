"""What every benchmark shares: the workload, the surroundings, the JSON line."""

import json
import os
import platform
import subprocess
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

import mlx.core as mx

from dspark_batch import blas
from dspark_batch.pair import Pair
from dspark_batch.types import Item, Request

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "sample_inputs" / "heldout.jsonl"
_EARLY = 1  # windows of the driver that end before a job has been on for one


def surroundings():
    """Say where a number comes from."""
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    return {
        "commit": _commit(),
        "device": mx.device_info()["device_name"] if on_gpu else f"CPU, {platform.machine()}",
        "blas": None if on_gpu else blas.identity(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
    }


def held_out_records(limit):
    """Read held-out items, spread over all kinds."""
    records = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    return records[:: max(1, len(records) // limit)][:limit]


def requests(pair: Pair, prompts, max_tokens, system=None):
    """Render prompts as a job would."""
    head = [{"role": "system", "content": system}] if system else []
    return [
        Request(
            Item(index, str(index), f"{index:032x}", f"benchmark:{index}"),
            tuple(pair.tokenizer.render([*head, {"role": "user", "content": prompt}])),
            max_tokens,
        )
        for index, prompt in enumerate(prompts)
    ]


@contextmanager
def busy_share():
    """Count how busy the GPU is meanwhile: what is yielded is called behind it.

    That is the share of the time in which some kernel runs, as NVIDIA's driver counts it, asked
    every half second; None without such a driver.
    """
    card = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    asked = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    words = ["nvidia-smi", "-i", card, *asked]
    try:
        process = subprocess.Popen([*words, "-lms", "500"], stdout=subprocess.PIPE, text=True)
    except OSError:
        yield lambda: None
        return
    try:
        yield lambda: _mean_share(process)
    finally:
        process.kill()


def _mean_share(process):
    """End a process of `busy_share`; give the mean of its windows, less those that began before."""
    process.terminate()
    said, _ = process.communicate()
    percent = [float(word) for word in said.split()[_EARLY:] if word.isdigit()]
    return round(mean(percent) / 100, 3) if percent else None


def spread(samples):
    """Median, smallest and largest of some samples."""
    return {"median": median(samples), "min": min(samples), "max": max(samples)}


def print_line(result):
    """Print the benchmark's one line."""
    print(json.dumps(result))


def _commit():
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
