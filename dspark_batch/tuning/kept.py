"""What is kept on the disk about this machine: verdicts, which are facts, and hints."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson

from dspark_batch import blas
from dspark_batch.device import cache_folder, keep
from dspark_batch.numerics import attention, joined, rows
from dspark_batch.tuning.pace import Weights
from dspark_batch.types import Json

_FORMAT = 4  # of what is kept; what has another one is ignored

# Products whose bits are compared with the kept ones. Long rows: short ones often have equal bits.
_COMPARED = tuple(rows.Product(dtype, 3000, 64) for dtype in ("float32", "bfloat16"))


def read_verdicts() -> None:
    """Take over the verdicts that are kept, if this is still the machine that they are about.

    A file that is torn, of another version or machine, or with bits that its products do not have
    here is ignored; then the verdicts are found anew.
    """
    rows.forget()  # a resume may have set another number of threads
    kept = _read("verdicts")
    if kept is None:
        return
    found = {(_product(name), count): is_safe for name, count, is_safe in kept["verdicts"]}
    if kept["bits"] == _bits():
        rows.VERDICTS.update(found)


def keep_verdicts() -> None:
    """Keep what this process knows; a folder that cannot be written costs time only."""
    verdicts = [
        [list(p), count, safe] for (p, count), safe in sorted(rows.VERDICTS.items(), key=str)
    ]
    _keep("verdicts", {"verdicts": verdicts, "bits": _bits()})


def read_costs(pair: str) -> Weights | None:
    """Read what the parts of a round of this pair cost here; None: nobody knows."""
    kept = _read(f"costs-{_digest(pair)}")
    if kept is None:
        return None
    target, token, drafter, draft = kept["costs"]
    return target, token, drafter, draft


def keep_costs(pair: str, costs: Weights) -> None:
    """Keep what the parts of a round cost, as a hint for the next job."""
    _keep(f"costs-{_digest(pair)}", {"costs": costs})


def forget() -> int:
    """Drop all that is kept about this machine, and any other; return how many files it was."""
    files = sorted(folder().glob("*"))
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)


def machine() -> dict[str, Json]:
    """Say what decides about bits and speed here; what is kept is about exactly this."""
    known = mx.device_info(mx.default_device())  # its free memory changes all the time
    return {
        "device": [known.get("device_name"), known.get("architecture"), str(mx.default_device())],
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "blas": blas.identity(),
        "kernels": [attention.kernel_name(), joined.kernel_name()],
    }


def folder() -> Path:
    """Name the folder of all that is kept about machines."""
    return cache_folder() / "machines"


def _path(name: str) -> Path:
    return folder() / f"{name}-{_digest(machine())}.json"


def _read(name: str) -> dict[str, Any] | None:
    path = _path(name)
    try:
        if not path.is_file():  # a pipe would be waited for without end
            return None
        content = orjson.loads(path.read_bytes())
        body = content["kept"]
        is_whole = content["seal"] == _digest([_FORMAT, body]) and content["machine"] == machine()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return body if is_whole else None


def _keep(name: str, body: Mapping[str, object]) -> None:
    path = _path(name)
    content = {"machine": machine(), "kept": body, "seal": _digest([_FORMAT, body])}
    with suppress(OSError):
        keep(path, orjson.dumps(content))


def _digest(value: object) -> str:
    encoded = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(encoded).hexdigest()[:32]


def _bits() -> str:
    """Digest the bits of some products, which takes milliseconds."""
    digest = hashlib.sha256()
    for product in _COMPARED:
        digest.update(rows.reference_bits(product))
    return digest.hexdigest()


def _product(fields: Sequence[Any]) -> rows.Product:
    product = rows.Product(*fields)
    if product.quantised is None:
        return product
    bits, group_size, mode = product.quantised  # a list, through JSON
    return product._replace(quantised=(bits, group_size, mode))
