"""The files of a training: `DRAFTER.run/` while it goes on, `DRAFTER/` once it is done."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import orjson

from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.errors import ResumeMismatch, UsageError
from dspark_batch.numerics.arrays import named_arrays
from dspark_batch.record.disk import full_disk_is_resumable, sync_file, write_text
from dspark_batch.train.teacher import Ends
from dspark_batch.train.training import Point
from dspark_batch.types import Json

_WEIGHTS = "model.safetensors"


class State(NamedTuple):
    """Where a training stands."""

    step: int
    arrays: dict[str, mx.array]


class Place:
    """Names a drafter's files, and writes them whole or not at all."""

    def __init__(self, to: str) -> None:
        self.out, self.work = Path(to), Path(f"{to}.run")
        self._plan, self._state = self.work / "plan.json", self.work / "state.safetensors"
        self._curve, self._draft = self.work / "curve.jsonl", self.work / "drafter"

    def begin(self, plan: Mapping[str, Json], *, overwrite: bool) -> None:
        """Keep the plan of a new training, or see that an old one had the same.

        Raises:
            ResumeMismatch: another training is here, which took steps.
            UsageError: something else is.
        """
        if overwrite:
            self.discard()
        known = self.plan()
        if known is None:
            if self.out.exists():
                raise UsageError(
                    f"{self.out} exists, and no training here made it. Choose another name, or "
                    "replace it with --overwrite."
                )
            write_text(self._plan, orjson.dumps(plan, option=orjson.OPT_INDENT_2).decode())
            return
        here = orjson.loads(orjson.dumps(plan))
        differing = [
            f"{name} is {known.get(name)} there and {value} here"
            for name, value in here.items()
            if known.get(name) != value
        ]
        if differing and not (self._state.exists() or self.out.exists()):
            self.begin(plan, overwrite=True)  # nothing was trained, as behind a mistaken option
            return
        if differing:
            raise ResumeMismatch(
                f"{self.work} holds another training: {'; '.join(differing)}. Put the old values "
                "back, choose another name, or start over with --overwrite."
            )

    def plan(self) -> dict[str, Json] | None:
        """Read the plan of the training that is here; None: there is none."""
        return orjson.loads(self._plan.read_bytes()) if self._plan.exists() else None

    def discard(self) -> None:
        """Forget the training and its drafter; the lock stays."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self._draft, ignore_errors=True)
        for path in self.work.iterdir():
            if path.name != "lock":
                path.unlink()

    def save_state(self, state: State) -> None:
        """Keep a state, so that a crash loses only the steps behind it."""
        draft = self.work / "state.tmp.safetensors"
        with full_disk_is_resumable(self._state):
            mx.save_safetensors(str(draft), state.arrays, {"step": str(state.step)})
            sync_file(draft)
            draft.replace(self._state)

    def state(self) -> State | None:
        """Read the last state; None: nothing was trained yet."""
        if not self._state.exists():
            return None
        loaded: Any = mx.load(str(self._state), return_metadata=True)
        arrays, about = loaded
        mx.eval(arrays)  # the file is about to be replaced
        return State(int(about["step"]), arrays)

    def add_to_curve(self, point: Mapping[str, Json]) -> None:
        """Note how far the loss fell."""
        with full_disk_is_resumable(self._curve), self._curve.open("ab") as file:
            file.write(orjson.dumps(point, option=orjson.OPT_APPEND_NEWLINE))

    def curve(self, up_to: int) -> list[Point]:
        """Read the points up to a step; those behind it, which a crash left, go."""
        if not self._curve.exists():
            return []
        lines = self._curve.read_bytes().splitlines(keepends=True)
        points = [orjson.loads(line) for line in lines if line.endswith(b"\n")]
        kept = [point for point in points if point["step"] <= up_to]
        text = b"".join(orjson.dumps(p, option=orjson.OPT_APPEND_NEWLINE) for p in kept)
        write_text(self._curve, text.decode())
        return kept

    def publish(self, files: Mapping[str, str], drafter: Mapping[str, mx.array]) -> None:
        """Make the drafter's directory appear, whole.

        Args:
            files: names and texts.
            drafter: its tensors.
        """
        draft = self._draft
        shutil.rmtree(draft, ignore_errors=True)
        with full_disk_is_resumable(self.out):
            draft.mkdir()
            mx.save_safetensors(str(draft / _WEIGHTS), dict(drafter), {"format": "pt"})
            for name, text in files.items():
                (draft / name).write_text(text, encoding="utf-8")
            for path in draft.iterdir():
                sync_file(path)
            os.replace(draft, self.out)  # noqa: PTH105  a directory in a directory's place

    def is_done(self) -> bool:
        """Whether the drafter of the training here is there."""
        return self.plan() is not None and (self.out / "report.json").exists()

    def report(self) -> dict[str, Any]:
        """Read what was measured of a finished drafter."""
        return orjson.loads((self.out / "report.json").read_bytes())


def stored_weights(drafter: DSparkDrafter, ends: Ends) -> dict[str, mx.array]:
    """List a drafter's tensors as DeepSpec stores them.

    What was trained is stored in bfloat16; the target's ends in the smallest type that keeps every
    bit, so that a loaded pair can share them.
    """
    ends_by_name = {"embed_tokens.weight": ends.embedding, "lm_head.weight": ends.head}
    trained = {
        name: array.astype(mx.bfloat16)
        for name, array in named_arrays(drafter)
        if name not in ends_by_name
    }
    return trained | {name: _smallest_exact(array) for name, array in ends_by_name.items()}


def _smallest_exact(array: mx.array) -> mx.array:
    for dtype in (mx.bfloat16, mx.float16):
        smaller = array.astype(dtype)
        if mx.array_equal(smaller.astype(mx.float32), array.astype(mx.float32)):
            return smaller
    return array
