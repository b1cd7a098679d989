"""What a probe found out about this machine, kept so that it is measured once."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import orjson

from dspark_batch import blas
from dspark_batch.engine.scheduler import DrafterPass, StepCurve, TargetPass
from dspark_batch.engine.shapes import Shapes
from dspark_batch.models.calibration import cache_folder
from dspark_batch.numerics.attention import kernel_name
from dspark_batch.types import Json


@dataclass(frozen=True, slots=True)
class Machine:
    """For one target on one device: its shape class, and what passes cost."""

    shapes: Shapes  # the class
    numerics: str  # names the bits of the class
    target: tuple[TargetPass, ...]  # of the class
    others: tuple[TargetPass, ...] = ()  # that were measured and give other bits
    divergence: float = 0.0  # of a logit at most, between the others and the class

    def curve(self, drafter: Sequence[DrafterPass], *, exact: bool) -> StepCurve:
        """Say what rounds cost: in the class only, or in any pass."""
        return StepCurve(self.target + (() if exact else self.others), tuple(drafter))

    def to_json(self) -> dict[str, Json]:
        """Return what `from_json` reads back."""
        return {
            "shapes": self.shapes.to_json(),
            "numerics": self.numerics,
            "target": [list(each) for each in self.target],
            "others": [list(each) for each in self.others],
            "divergence": self.divergence,
        }

    @classmethod
    def from_json(cls, known: Mapping[str, Json]) -> "Machine":
        """Read what `to_json` wrote."""
        return cls(
            Shapes.from_json(known["shapes"]),
            known["numerics"],
            tuple(TargetPass(*each) for each in known["target"]),
            tuple(TargetPass(*each) for each in known["others"]),
            known["divergence"],
        )


def kept(name: str, measure: Callable[[], Json]) -> Json:
    """Read what was measured under a name on this device and with this MLX, or measure it now.

    A folder that cannot be written costs a measurement at every start, and nothing else.
    """
    path = cache_folder() / "machines" / f"{_key(name)}.json"
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        measured = measure()
        _keep(path, measured)
        return measured


def _keep(path: Path, measured: Json) -> None:
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(orjson.dumps(measured))
        draft.replace(path)
    except OSError:
        return


def _key(name: str) -> str:
    known = mx.device_info(mx.default_device())  # its free memory changes all the time
    device = [known.get("device_name"), known.get("architecture"), str(mx.default_device())]
    described = [name, device, version("mlx"), version("mlx-lm"), blas.ACTIVE, kernel_name()]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:32]
