import shutil
import sys
from pathlib import Path

import pytest

import dspark_batch.tiny
from dspark_batch import Spec, run
from dspark_batch.train import session, sizes

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # checkpoints, families

TOKENIZER = Path(dspark_batch.tiny.__path__[0]) / "target"
WORDS = ("one", "two", "red", "blue", "sun", "moon", "tree", "stone")


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    """A random target of another family than the drafter's layers, with a tokenizer."""
    import checkpoints
    import families

    config = families.family("llama", vocab_size=1536, tie_word_embeddings=True, eos_token_id=2)
    directory = checkpoints.write_target(tmp_path_factory.mktemp("target"), config)
    for path in TOKENIZER.glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="session")
def answered(tmp_path_factory, target):
    """The output of a finished run of 40 records; read only."""
    import orjson

    folder = tmp_path_factory.mktemp("run")
    records = [
        {"id": f"r{i}", "prompt": f"{WORDS[i % 8]} {WORDS[i // 8]}", "kind": WORDS[i % 2]}
        for i in range(40)
    ]
    (folder / "in.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in records))
    out = folder / "out.jsonl"
    inputs = (str(folder / "in.jsonl"),)
    run(Spec(inputs=inputs, out=str(out), target=str(target), max_tokens=20, slots=8))
    return out


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Few tokens in a step, and a state behind every second one."""
    monkeypatch.setattr(sizes, "_CPU_TOKENS", 256)
    monkeypatch.setattr(session, "_STATES", 1000)
