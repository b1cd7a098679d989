import faulthandler
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

import dspark_batch.models  # noqa: F401  loads the BLAS, before MLX
from dspark_batch.device import cache_folder

sys.path.insert(0, str(Path(__file__).parent))  # fakes, golden_cases

# What the user's own pairs were calibrated to must change no test, nor what is known of here.
# But which names transformers has was read by whoever started us; it follows from its files.
_CACHE = tempfile.TemporaryDirectory(prefix="dspark-batch-cache-")
for names in (cache_folder() / "machines").glob("names-*.json"):
    Path(_CACHE.name, "machines").mkdir(exist_ok=True)
    shutil.copy(names, Path(_CACHE.name, "machines"))
os.environ["DSPARK_BATCH_CACHE"] = _CACHE.name

# MLX wakes a thread of its own for every operation, which would stop us each time.
if hasattr(os, "SCHED_BATCH"):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# A CI that runs us in the background has SIGINT ignored, and nohup SIGHUP. Our children would
# inherit that; of a handler they inherit nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_collection_finish(session):
    """Keep the collector from walking through modules and thousands of tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _slow_is_no_hang(request):
    """Take back pytest's alarm, which ends a test that takes minutes."""
    if request.node.get_closest_marker("slow"):
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True, scope="session")
def _one_check_of_a_target():
    """Check each target once; the check is a function of weights, number type and code.

    What tests of the check make of a target is checked each time.
    """
    from dspark_batch.caches import slot_cache
    from dspark_batch.engine import setup
    from dspark_batch.models.target import Target
    from dspark_batch.numerics import attention

    check, found = setup._conformance, {}

    def once(pair):
        if type(pair.target) is not Target:
            return check(pair)
        weights = tuple(map(pair.config.identity.get, ("target", "target_bits", "dtype")))
        key = (weights, setup.conformance, attention.BLOCK, slot_cache.BLOCK)
        if key not in found:
            found[key] = check(pair)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "_conformance", once)
        yield
