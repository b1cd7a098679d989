"""Small jobs for tests: write an input, start, look at the rows."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from fakes import fake_opener

from dspark_batch.run import run
from dspark_batch.spec.spec import Spec

SETUP = {
    "plan": {"slots": 4, "draft_length": 7, "why": "because"},
    "step_shape": None,
    "divergence": 0.0,
    "dtype": "float32",
    "blas_threads": None,
}


def planned(engine=None, **more):
    """Make an `open_engine` that says how it decodes here."""
    opener = fake_opener(engine)
    return lambda spec, manifest: opener(spec, manifest)._replace(setup=SETUP, **more)


def write_lines(path: Path, *lines) -> Path:
    """Write JSONL: a dict as JSON, bytes as they are."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def prompts(*texts):
    return [{"id": f"id-{text}", "prompt": text} for text in texts]


def start(folder: Path, *, engine=None, opener=None, observe=None, is_asked=None, **options):
    """Run `folder/in.jsonl` into `folder/out.jsonl` with the fake engine, unless told otherwise."""
    options = {"inputs": (str(folder / "in.jsonl"),), "out": str(folder / "out.jsonl")} | options
    watch = {"observe": observe, "stop": is_asked}
    watch = {name: given for name, given in watch.items() if given is not None}
    return run(Spec(**options), open_engine=opener or fake_opener(engine), **watch)


def rows_in(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def errors_in(path: Path) -> list[dict | None]:
    return [row["error"] for row in rows_in(path)]
