"""Build the wheel, install it beside nothing of this checkout, and answer two prompts with it.

Only its dependencies come from the environment that runs this.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
MUST_HAVE = (
    "dspark_batch/py.typed",
    "dspark_batch/numerics/joined.cu",
    "dspark_batch/numerics/ragged_attention.cu",
    "dspark_batch/page/report.html",
    "dspark_batch/tiny/target/model.safetensors",
    "dspark_batch/tiny/target/tokenizer.json",
    "dspark_batch/tiny/drafter/model.safetensors",
)
COMPILED = shutil.ignore_patterns("__pycache__")
PROMPTS = ("What is 2 + 3?", "Sort: 3, 1, 2")


def run(*words, cwd):
    """Run a command, and end with what it said if it fails."""
    done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def built(folder):
    """Build the wheel of a copy, where no earlier build has left anything, and look into it."""
    source = folder / "source"
    shutil.copytree(CHECKOUT / "dspark_batch", source / "dspark_batch", ignore=COMPILED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder)
    run(*pip, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    if missing := [name for name in MUST_HAVE if name not in names]:
        sys.exit(f"{wheel.name} lacks {missing}")
    rooms = {name.partition("/")[0] for name in names}
    if more := [room for room in rooms if room != "dspark_batch" and ".dist-info" not in room]:
        sys.exit(f"{wheel.name} has {more} besides the package")
    return wheel


def installed(wheel, folder):
    """Install it into an environment of its own; return the folder of its commands."""
    venv.create(folder, with_pip=False)
    names = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=names))
    target = (sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", "--no-deps")
    run(*target, wheel, cwd=folder)
    site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def main():
    """Build, install, answer."""
    with tempfile.TemporaryDirectory(prefix="dspark-batch-wheel-") as place:
        folder = Path(place)
        commands = installed(built(folder), folder / "venv")
        where = run(commands / "python", "-c", "import dspark_batch as d; print(d)", cwd=folder)
        if str(folder) not in where:
            sys.exit(f"the installed package is not what was built: {where}")
        version = run(commands / "dspark-batch", "--version", cwd=folder)
        lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        job = ("run", "prompts.jsonl", "-o", "out.jsonl", "--max-tokens", 16, "--quiet")
        run(commands / "dspark-batch", *job, cwd=folder)
        rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        if [row["status"] for row in rows] != ["succeeded"] * len(PROMPTS):
            sys.exit(f"the wheel gave other rows than two answers: {rows}")
        print(f"{version.strip()}: the wheel answers")


if __name__ == "__main__":
    main()
