"""Make an environment for each engine: python -m benchmarks.peers.environments FOLDER.

Each holds one engine, what it needs, and MLX for a CPU; FOLDER/NAME/bin/python runs it. Prints one
JSON line with seconds and megabytes. What is there already is left as it is.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import print_line

MLX = "mlx[cpu]==0.32.4"
ENGINES = {
    "mlx_lm": "mlx-lm==0.32.2",
    "mlx_vlm": "mlx-vlm==0.7.10",
    "vllm_mlx": "vllm-mlx==0.6.0",  # needs an older mlx-lm, and torchvision
    "mlx_dspark": "mlx-dspark==0.20.3",
}


def make(folder, requirement):
    """Make one environment; returns its seconds and megabytes."""
    began = time.perf_counter()
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", requirement, MLX]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    return {"seconds": round(time.perf_counter() - began), "mb": round(size / 1e6)}


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    options = parser.parse_args()
    made = {name: make(options.folder / name, ENGINES[name]) for name in options.engines}
    print_line({"benchmark": "peers.environments", "made": made})


if __name__ == "__main__":
    main()
