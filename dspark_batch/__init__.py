"""Offline batch generation on MLX with DSpark speculative decoding.

    from dspark_batch import Spec, run

    report = run(Spec(inputs=("prompts.jsonl",), out="out.parquet"))

Names are imported when they are first used, so `import dspark_batch` loads neither MLX nor pyarrow.
It loads the BLAS that MLX is to use on a Linux CPU, so import it before `mlx`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import dspark_batch.blas  # before MLX, as the next
import dspark_batch.launching  # noqa: F401

if TYPE_CHECKING:  # for checkers and editors; a test compares it with the table below
    from dspark_batch.bench import Comparison as Comparison
    from dspark_batch.bench import bench as bench
    from dspark_batch.calibrate import Calibration as Calibration
    from dspark_batch.calibrate import calibrate as calibrate
    from dspark_batch.check import check as check
    from dspark_batch.diff import Diff as Diff
    from dspark_batch.diff import diff as diff
    from dspark_batch.doctor import Diagnosis as Diagnosis
    from dspark_batch.doctor import diagnose as diagnose
    from dspark_batch.engine.engine import Engine as Engine
    from dspark_batch.errors import DsparkBatchError as DsparkBatchError
    from dspark_batch.generate import Generation as Generation
    from dspark_batch.generate import Options as Options
    from dspark_batch.generate import generate as generate
    from dspark_batch.generate import speculative_generate as speculative_generate
    from dspark_batch.merge import merge as merge
    from dspark_batch.pair import Pair as Pair
    from dspark_batch.pair import load_pair as load_pair
    from dspark_batch.registry import RegisteredPair as RegisteredPair
    from dspark_batch.registry import list_pairs as list_pairs
    from dspark_batch.report import write_report as write_report
    from dspark_batch.run import Report as Report
    from dspark_batch.run import Tick as Tick
    from dspark_batch.run import run as run
    from dspark_batch.spec.spec import Spec as Spec
    from dspark_batch.train_drafter import Training as Training
    from dspark_batch.train_drafter import train_drafter as train_drafter
    from dspark_batch.types import Completion as Completion
    from dspark_batch.types import Failure as Failure
    from dspark_batch.types import Item as Item
    from dspark_batch.types import Request as Request
    from dspark_batch.types import Sampling as Sampling
    from dspark_batch.verify import Audit as Audit
    from dspark_batch.verify import verify as verify

_MODULE_BY_NAME = {
    "Audit": "verify",
    "Calibration": "calibrate",
    "Comparison": "bench",
    "Completion": "types",
    "Diagnosis": "doctor",
    "Diff": "diff",
    "DsparkBatchError": "errors",
    "Engine": "engine.engine",
    "Failure": "types",
    "Generation": "generate",
    "Item": "types",
    "Options": "generate",
    "Pair": "pair",
    "RegisteredPair": "registry",
    "Report": "run",
    "Request": "types",
    "Sampling": "types",
    "Spec": "spec.spec",
    "Tick": "run",
    "Training": "train_drafter",
    "bench": "bench",
    "calibrate": "calibrate",
    "check": "check",
    "diagnose": "doctor",
    "diff": "diff",
    "generate": "generate",
    "list_pairs": "registry",
    "merge": "merge",
    "load_pair": "pair",
    "run": "run",
    "speculative_generate": "generate",
    "train_drafter": "train_drafter",
    "verify": "verify",
    "write_report": "report",
}
__all__ = list(_MODULE_BY_NAME)


if not TYPE_CHECKING:  # else a checker would believe in every name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_BY_NAME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing run.py binds the module `run` here; the function must keep the name.
        if name in _MODULE_BY_NAME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
