"""Where the temperatures of a pair's confidences are kept: a cache folder of the user."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from dspark_batch.device import cache_folder, keep
from dspark_batch.errors import ModelError, UsageError
from dspark_batch.types import Json

Identity = Mapping[str, Json]  # of a pair: its digests, by part


def kept_temperatures(identity: Identity) -> tuple[float, ...] | None:
    """Read a pair's temperatures, by block position; None: nobody calibrated it.

    A folder that cannot be read holds none. So a user without a home loses speed, and no run.

    Raises:
        ModelError: the file is damaged.
    """
    path = calibration_path(identity)
    try:
        if not path.is_file():  # a pipe would be waited for without end
            return None
        temperatures = tuple(float(t) for t in orjson.loads(path.read_bytes())["temperatures"])
    except OSError:
        return None
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: damaged ({error!r}). Delete it, or calibrate again.") from error
    if not all(t > 0 for t in temperatures):
        raise ModelError(f"{path}: temperatures are {temperatures}, expected positive numbers.")
    return temperatures


def keep_temperatures(identity: Identity, temperatures: Sequence[float], **about: Json) -> Path:
    """Keep a pair's temperatures, whole or not at all, with a few words `about` them."""
    path = calibration_path(identity)
    content = {"temperatures": temperatures, **about}
    try:
        keep(path, orjson.dumps(content, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}). Name another folder in "
            "DSPARK_BATCH_CACHE."
        ) from error
    return path


def calibration_path(identity: Identity) -> Path:
    """Name the file of a pair: target and drafter by their digests, wherever they lie."""
    pair = hashlib.sha256(f"{identity['target']} {identity['drafter']}".encode()).hexdigest()
    return cache_folder() / "calibration" / f"{pair[:32]}.json"
