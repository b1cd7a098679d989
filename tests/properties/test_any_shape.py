"""Any shape of a step gives a token the same bits, under every BLAS and kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from any_shape import differences, random_target, target_of

from dspark_batch import blas
from dspark_batch.numerics import rows

SCRIPT = Path(__file__).parent / "any_shape.py"
ENVIRONMENTS = {
    "haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "sandybridge": {"OPENBLAS_CORETYPE": "Sandybridge"},
    "two_threads": {"OPENBLAS_NUM_THREADS": "2"},
    "haswell_with_two_threads": {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "2"},
    "mlx's_own": {"DSPARK_BATCH_BLAS": "bundled"},
}
SIZES = ("96x4x2x48", "128x2x1x200", "160x5x5x96", "320x5x1x640", "moe96x4x2x48")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one BLAS")


@pytest.mark.parametrize("name", ["qwen3_vanilla", "qwen35_moe_dflash", "96x4x2x48"])
def test_every_step_gives_the_same_bits(name):
    assert list(differences(target_of(name), 1, (1, 7))) == []


@pytest.mark.parametrize("bits", [4, 8])
def test_so_does_a_quantised_target(bits):
    target = random_target("96x4x2x64", bits=bits)
    assert list(differences(target, 2, (1, 3))) == []


def said(name, seed, slots, variables):
    """Run the script in a process of its own; give what differed, and the BLAS."""
    if blas.LOADED.kind != "openblas" and "DSPARK_BATCH_BLAS" not in variables:
        pytest.skip("there is no OpenBLAS here")
    command = [sys.executable, str(SCRIPT), name, str(seed), *map(str, slots)]
    environment = os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *differ, identity = done.stdout.splitlines()
    return differ, identity


@needs_linux
@pytest.mark.parametrize("name", ["haswell_with_two_threads", "mlx's_own"])
def test_so_it_does_with_other_kernels_and_threads(name):
    differ, identity = said("96x4x2x48", 3, (3,), ENVIRONMENTS[name])
    assert differ == []
    variables = ENVIRONMENTS[name]
    assert variables.get("OPENBLAS_CORETYPE", "") in identity
    if "OPENBLAS_NUM_THREADS" in variables:
        assert identity.endswith("threads 2")
    if "DSPARK_BATCH_BLAS" in variables:
        assert identity == "mlx's own"


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("name", ["tiny", "qwen3_vanilla", "gemma4_vanilla", *SIZES])
def test_so_do_many_steps_of_many_targets(name, environment):
    differ, _ = said(name, 4, (1, 2, 3, 7, 16, 33), ENVIRONMENTS[environment])
    assert differ == []


def test_the_check_sees_products_that_run_as_they_come(monkeypatch):
    monkeypatch.setattr(rows, "pieces", lambda product, count: (count,))
    found = list(differences(random_target("320x5x1x640"), 1, (1, 3)))
    if blas.LOADED.kind == "bundled":  # the reference BLAS multiplies row by row
        pytest.skip("here any product is safe")
    assert found
