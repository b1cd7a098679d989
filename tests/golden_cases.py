"""The recorded cases under tests/golden; tensor names as in the data card there."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

from dspark_batch.pair import Pair, load_pair

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/meta.json"))
HYBRIDS = [case for case in CASES if case.startswith("qwen35")]
DENSE = [case for case in CASES if case not in HYBRIDS]
GREEDY_RUNS = ["greedy0", "greedy1", "greedy2"]


@dataclass(frozen=True)
class Case:
    pair: Pair
    tensors: dict[str, mx.array]
    runs: dict[str, dict]

    def __getitem__(self, name):
        return self.tensors[name]

    def __contains__(self, name):
        return name in self.tensors

    def prompt(self, run):
        return tuple(self[f"{run}.prompt_ids"].tolist())

    def answer(self, run):
        return self[f"{run}.output_ids"].tolist()[len(self.prompt(run)) :]


@cache
def load_case(name):
    folder = GOLDEN / name
    meta = json.loads((folder / "meta.json").read_text())
    pair = load_pair(
        target=str(GOLDEN / "targets" / meta["case"]["target"]),
        drafter=str(folder / "drafter"),
        dtype="float32",
    )
    return Case(pair, mx.load(str(folder / "io.safetensors")), meta["runs"])


def largest_difference(ours, recorded):
    assert ours.shape == recorded.shape, f"{ours.shape} against {recorded.shape}"
    return mx.abs(ours.astype(mx.float32) - recorded).max().item()
