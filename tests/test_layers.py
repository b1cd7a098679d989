"""Imports point down, family names stay in one place, and words do not load models."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import dspark_batch

PACKAGE = Path(__file__).parents[1] / "dspark_batch"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"types", "errors", "wording"}
MACHINE = {"blas", "device", "launching"}
JOB = {"spec", "intake", "record", "output", "audit"}  # files, no arrays

# part of the package -> the other parts it may import, also inside functions and for types
MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "wording": set(),
    "device": {"launching", *BASE},
    "launching": set(),
    "blas": {"device"},
    "tiny": set(),
    "spec": BASE,
    "intake": {"spec", *BASE},
    "record": {"intake", "spec", *BASE},
    "output": {"record", "intake", "spec", *BASE},
    "audit": {"record", "intake", "spec", *BASE},
    "numerics": {*BASE, *MACHINE},
    "caches": {"numerics", *BASE, *MACHINE},
    "models": {"caches", "numerics", *BASE, *MACHINE},
    "drafters": {"models", "caches", "numerics", *BASE, *MACHINE},
    "pair": {"drafters", "models", *BASE, *MACHINE},
    "tuning": {"numerics", *BASE, *MACHINE},
    "answers": {"tuning", "pair", "drafters", "models", "numerics", *BASE, *MACHINE},
    "engine": {
        *("answers", "tuning", "pair", "drafters", "models", "caches", "numerics"),
        *BASE,
        *MACHINE,
    },
    "baseline": {"engine", "answers", "pair", "drafters", "numerics", *BASE, *MACHINE},
    "opening": {
        *("baseline", "engine", "answers", "pair", "models"),
        *("audit", "record", "intake", "spec"),
        *BASE,
        *MACHINE,
    },
    "run": {"opening", "fleet", "models", *JOB, *BASE},
    "fleet": {
        *("opening", "hub", "pair", "models", "audit", "record", "intake", "spec", "device"),
        *BASE,
    },
    "ray": {"hub", "opening", "generate", "record", "intake", "spec", *BASE},
    "hub": {"opening", "record", "intake", "spec", *BASE},
    "serve": {
        *("hub", "opening", "run", "engine", "answers", "output", "record", "intake", "spec"),
        *BASE,
    },
    "generate": {
        *("opening", "engine", "answers", "pair", "drafters", "models", "intake", "spec"),
        *BASE,
    },
    "bench": {
        *("opening", "baseline", "engine", "answers", "pair", "models"),
        *JOB,
        *BASE,
        *MACHINE,
    },
    "calibrate": {"drafters", "numerics", "record", *BASE},
    "registry": {"models", *BASE},
    "doctor": {"registry", "tuning", *BASE, *MACHINE},
    "check": {"pair", "models", "output", "record", "intake", "spec", *BASE},
    "verify": {"opening", "fleet", *JOB, *BASE},
    "merge": {"output", "record", "intake", "spec", *BASE},
    "diff": {"opening", "audit", "output", "record", *BASE},
    "train": {
        *("page", "pair", "drafters", "models", "numerics"),
        *("output", "record", "intake", "spec"),
        *BASE,
        *MACHINE,
    },
    "train_drafter": {"train", "check", "output", "record", "spec", *BASE},
    "page": {"output", "record", "spec", *BASE},
    "report": {"page", "output", "record", "intake", *BASE},
    "cli": {
        *("run", "calibrate", "registry", "doctor", "check", "report", "verify", "diff"),
        "merge",
        *("generate", "bench", "serve", "train", "train_drafter"),
        *JOB,
        *BASE,
    },
    "__init__": {
        "blas",
        "launching",
        *(name.split(".")[0] for name in dspark_batch._MODULE_BY_NAME.values()),
    },
    "__main__": {"cli"},
}
NO_MODELS = {*JOB, *BASE, "merge", "cli", "__init__", "__main__"}  # nor anything as heavy
HEAVY = {"mlx", "mlx_lm", "transformers", "torch", "numpy"}
# Decides from seconds, so it must see nothing else.
PACE = {"numpy", "collections", "dataclasses", "math", "statistics", "typing"}
# What computes bytes asks nobody how late it is; these two only tell what took how long.
COMPUTES = {
    "numerics",
    "caches",
    "models",
    "drafters",
    "answers",
    "engine",
    "baseline",
    "tuning",
    "pair",
    "device",
    "blas",
}
TELLS_SECONDS = {"engine/clock.py", "answers/sequence.py"}
CLOCKS = {"time", "datetime", "timeit"}
# What other commands and options need, and a plain run with `-q` would wait for.
OTHERS = {
    "rich",
    "fsspec",
    "matplotlib",
    "llguidance",
    "ray",
    "starlette",
    "uvicorn",
    "pandas",
    "torch",
}
OTHERS |= {"pyarrow.compute", "pyarrow.dataset", "mlx_lm.server", "huggingface_hub.inference"}
OTHERS |= {f"dspark_batch.{part}" for part in ("serve", "fleet", "train", "page", "hub", "bench")}
FAMILY = re.compile(r"qwen|gemma|llama", re.IGNORECASE)
COMMANDS = ("run", "check", "status", "report", "export", "show", "verify", "diff", "merge")
COMMANDS += ("generate", "serve", "train-drafter")
FAMILIES_LIVE_IN = {"models", "drafters", "tiny"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def imported_modules(source: str) -> set[str]:
    """Every module that `source` names in an import, wherever it stands."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            names = {f"{origin}.{alias.name}" for alias in node.names}
            modules |= names if origin == "dspark_batch" else {origin}
    return modules


def imported_parts(source: str) -> set[str]:
    names = (module.split(".") for module in imported_modules(source))
    return {name[1] for name in names if name[0] == "dspark_batch" and len(name) > 1}


def test_the_reader_of_imports_sees_every_form():
    source = """
import dspark_batch.errors
from dspark_batch import spec
from dspark_batch.drafters.qwen3 import Qwen3
if TYPE_CHECKING:
    from dspark_batch.run import Tick
def late():
    from dspark_batch.engine import engine
"""
    assert imported_parts(source) == {"errors", "spec", "drafters", "run", "engine"}
    assert imported_modules("from . import cache\nfrom ..job import spec") == {".", "..job"}


def test_imports_point_down():
    new = {part_of(path) for path in FILES} - MAY_IMPORT.keys()
    assert not new, f"{new} are new: say in MAY_IMPORT what they may import"
    upward = {
        str(path): names
        for path in FILES
        if (names := imported_parts(path.read_text()) - MAY_IMPORT[part_of(path)] - {part_of(path)})
    }
    assert not upward


def test_no_part_may_import_what_it_does_not():
    used = {part: set() for part in MAY_IMPORT}
    for path in FILES:
        used[part_of(path)] |= imported_parts(path.read_text())
    unused = {part: may - used[part] - BASE - MACHINE for part, may in MAY_IMPORT.items()}
    assert not {part: names for part, names in unused.items() if names}


def test_imports_are_absolute():
    relative = {
        str(path): names
        for path in FILES
        if (names := {n for n in imported_modules(path.read_text()) if n.startswith(".")})
    }
    assert not relative


def test_files_and_words_know_no_arrays():
    heavy = {
        str(path): names
        for path in FILES
        if part_of(path) in NO_MODELS
        and (names := {n.split(".")[0] for n in imported_modules(path.read_text())} & HEAVY)
    }
    assert not heavy


def test_who_decides_from_seconds_knows_nothing_else():
    pace = PACKAGE / "tuning" / "pace.py"
    roots = {name.split(".")[0] for name in imported_modules(pace.read_text())}
    assert roots <= PACE


def test_what_computes_reads_no_clock():
    asks = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if part_of(path) in COMPUTES and imported_modules(path.read_text()) & CLOCKS
    }
    assert asks == TELLS_SECONDS


def test_only_the_server_knows_http():
    serving = {"starlette", "uvicorn", "h11", "python_multipart"}
    elsewhere = [path for path in FILES if part_of(path) != "serve"]
    roots = {path: imported_modules(path.read_text()) for path in elsewhere}
    named = [str(p) for p, names in roots.items() if serving & {n.split(".")[0] for n in names}]
    assert not named


def test_only_the_fleet_and_its_stage_know_ray():
    elsewhere = [path for path in FILES if part_of(path) not in ("fleet", "ray")]
    roots = {path: imported_modules(path.read_text()) for path in elsewhere}
    named = [str(p) for p, names in roots.items() if "ray" in {n.split(".")[0] for n in names}]
    assert not named


def test_only_models_know_families_by_name():
    elsewhere = [path for path in FILES if part_of(path) not in FAMILIES_LIVE_IN]
    named = [
        str(path.relative_to(PACKAGE)) for path in elsewhere if FAMILY.search(path.read_text())
    ]
    assert not named


WORDS = [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"]]


def test_words_load_neither_models_nor_tables():
    program = (
        "import sys; from dspark_batch.cli.main import main\n"
        f"for words in {WORDS}: main(words)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert "click" in loaded
    assert done.stdout.count("Usage: ") == len(WORDS) - 1
    assert not loaded & (HEAVY | {"pyarrow", "rich", "orjson", "huggingface_hub"})


def test_a_start_loads_nothing_that_only_others_need(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "What is 2 + 3?"}')
    program = (
        "import sys; from dspark_batch.cli.main import main; code = main(sys.argv[1:]);"
        "print(sorted(sys.modules)); sys.exit(code)"
    )
    words = ["run", str(tmp_path / "in.jsonl"), "-o", "-", "-q", "--max-tokens", "1"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert {"mlx.core", "transformers", "dspark_batch.engine.engine"} <= loaded
    assert not loaded & OTHERS
