"""Plants one defect at a time in a copy of the engine, lets it run a job, and verifies the job.

    python -m benchmarks.planted_defects            all of them
    python -m benchmarks.planted_defects NAME...    only these

Prints commands and output as docs/exactness.md shows them. The same job without a defect must
verify; a defect that verify does not find is an error.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from benchmarks.planted_mistakes import ROOT, plant

JOB = ["--slots", "8"]
INPUT = "sample_inputs/prompts.jsonl"
FOUND, REFUSED = 3, 2  # exit codes: of verify, and of a target that is refused when it is loaded


def command(copy, *words):
    """Run the program of a copy from there; return its exit code and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-m", "dspark_batch", *words]
    done = subprocess.run(line, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, FOUND, REFUSED):
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}\n{done.stderr}")
    return done.returncode, done.stdout


def verified(given=INPUT, defect=None):
    """Run and verify a job, with a defect if there is one; return verify's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(
            ROOT / "dspark_batch", copy / "dspark_batch", ignore=shutil.ignore_patterns("*.pyc")
        )
        Path(copy, given).parent.mkdir()
        shutil.copy(ROOT / given, copy / given)
        if defect is not None:
            plant(defect, copy)
        code, _ = command(copy, "run", given, "-o", "out.jsonl", "-q", *JOB)
        print(f"$ dspark-batch run {given} -o out.jsonl {' '.join(JOB)}")
        if code == REFUSED:
            print("refused when the target is loaded\n", flush=True)
            return FOUND
        code, said = command(copy, "verify", "out.jsonl", "-q")
        print(f"$ dspark-batch verify out.jsonl\n{said}$ echo $?\n{code}\n", flush=True)
        return code


def main(names):
    path = Path(__file__).with_suffix(".toml")
    every = tomllib.loads(path.read_text())["mistake"]
    chosen = [each for each in every if not names or each["name"] in names]
    print("No defect:\n")
    for given in dict.fromkeys(each.get("input", INPUT) for each in chosen):
        if verified(given):
            raise SystemExit(f"{given}: without a defect, verify finds something")
    missed = []
    for defect in chosen:
        print(f"{defect['name']}: {defect['says']}\n")
        code = verified(defect.get("input", INPUT), defect)
        missed += [] if code == FOUND else [defect["name"]]
    if missed:
        raise SystemExit(f"not found: {', '.join(missed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
