"""Offline batch generation on MLX with DSpark speculative decoding.

    from dspark_batch import Spec, run

    report = run(Spec(inputs=("prompts.jsonl",), out="out.parquet"))

Names are imported when they are first used, so `import dspark_batch` loads neither MLX nor pyarrow.
It loads the BLAS that MLX is to use on a Linux CPU, so import it before `mlx`.
"""

import sys
from importlib import import_module
from types import ModuleType

import dspark_batch.blas  # noqa: F401  before MLX

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
    "load_pair": "pair",
    "run": "run",
    "speculative_generate": "generate",
    "train_drafter": "train_drafter",
    "verify": "verify",
    "write_report": "report",
}
__all__ = list(_MODULE_BY_NAME)


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
