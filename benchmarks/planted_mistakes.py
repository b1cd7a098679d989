"""Plants one mistake at a time in a copy of the package and runs the tests that should see it.

    python benchmarks/planted_mistakes.py            all of them, and write docs/planted-mistakes.md
    python benchmarks/planted_mistakes.py NAME...    only these, and write nothing

A mistake is a change of source text that must stand there exactly once, so a mistake that no
longer applies is an error, not a pass; and the same tests must pass without it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "planted-mistakes.md"
TESTS = {
    "drafter": ["tests/models/test_dspark.py", "tests/models/test_variants.py"],
    "variants": ["tests/models/test_variants.py"],
    "states": [
        "tests/models/test_hybrids.py",
        "tests/models/test_qwen3_5.py",
        "tests/engine/test_states.py",
        "tests/caches/test_prefix_cache.py",
        "tests/engine/test_prefill.py",
    ],
    "trainer": [
        *("tests/train/test_drafter_step.py", "tests/train/test_training_batches.py"),
        *("tests/train/test_teacher.py", "tests/train/test_train_drafter.py"),
        *("tests/train/test_llama_step.py", "tests/train/test_muon.py"),
    ],
    "few": [
        *("tests/numerics/test_among.py", "tests/train/test_few_tokens.py"),
        "tests/models/test_variants.py",
    ],
    "pace": ["tests/tuning/test_pace.py", "tests/engine/test_round_clock.py"],
    "halves": ["tests/models/test_joined_layers.py", "tests/numerics/test_safe_rows.py"],
    "room": [
        *("tests/models/test_long_prompts.py", "tests/engine/test_drafts_ahead.py"),
        *("tests/engine/test_setup.py", "tests/engine/test_states.py"),
    ],
    "angles": ["tests/models/test_rotations.py"],
    "sharing": [
        *("tests/engine/test_sharing.py", "tests/numerics/test_attention.py"),
        "tests/models/test_joined_layers.py",
    ],
    "strips": ["tests/numerics/test_strips.py", "tests/models/test_safe_layers.py"],
    "packing": ["tests/models/test_packed_passes.py", "tests/engine/test_packed_rounds.py"],
    "ahead": ["tests/engine/test_rounds_ahead.py"],
    "seats": [
        *("tests/engine/test_cache.py", "tests/engine/test_scheduler.py"),
        "tests/engine/test_rounds_ahead.py",
    ],
    "loop": ["tests/engine/test_golden_runs.py", "tests/engine/test_sliding_window.py"],
}
HEAD = """# Planted mistakes

Verification hides what is wrong with a drafter: the tokens stay right and only the acceptance
falls. So each mistake below was planted alone in a copy of the package and the tests were run on
it; the last column is the first test that failed. Seen: {seen} of {count}.

`python benchmarks/planted_mistakes.py` makes this page anew, from `planted_mistakes.toml`.

| mistake | in | seen by |
|---|---|---|
{rows}
"""


def plant(mistake, copy):
    """Change the copy's source."""
    path = copy / "dspark_batch" / mistake["file"]
    source = path.read_text()
    for edit in mistake["edit"]:
        if source.count(edit["old"]) != 1:
            stands = f"stands {source.count(edit['old'])} times in {mistake['file']}"
            raise SystemExit(f"{mistake['name']}: {stands}, expected once: {edit['old']}")
        source = source.replace(edit["old"], edit["new"])
    path.write_text(source)


def first_failure(tests, only, mistake=None):
    """Run tests on a copy, with a mistake in it if given; return the test that failed first."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("dspark_batch", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mistake is not None:
            plant(mistake, copy)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [*command, *TESTS[tests], "-k", only],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
    failed = re.search(r"^FAILED \S*?(\w+\.py)::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1) != (failed is not None):
        raise SystemExit(f"{mistake and mistake['name']}: no test ran\n{done.stdout}{done.stderr}")
    return failed and f"{failed[1]}: {failed[2]}"


def main(names):
    every = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["mistake"]
    chosen = [each for each in every if not names or each["name"] in names]
    for tests, only in sorted({(each["tests"], each["only"]) for each in chosen}):
        if seen := first_failure(tests, only):
            raise SystemExit(f"without a mistake, {seen} fails")
    rows, missed = [], []
    for each in chosen:
        seen = first_failure(each["tests"], each["only"], each)
        print(f"{each['name']}: {seen or 'NOT SEEN'}", flush=True)
        rows.append(f"| {each['name']} | `{each['file']}` | {seen or '**not seen**'} |")
        missed += [] if seen else [each["name"]]
    if not names:
        seen = len(chosen) - len(missed)
        TABLE.write_text(HEAD.format(seen=seen, count=len(chosen), rows="\n".join(rows)))
    if missed:
        raise SystemExit(f"not seen: {', '.join(missed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
