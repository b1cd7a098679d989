"""OpenBLAS helps only if it is there before MLX, and nobody is told otherwise."""

import os
import subprocess
import sys

import pytest


def active(code, **environment):
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; from dspark_batch import blas; print(blas.ACTIVE)"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_mlx_that_came_first_keeps_its_own_blas():
    assert active("import mlx.core") == "bundled"


def test_the_user_can_keep_the_bundled_one():
    assert active("pass", DSPARK_BATCH_BLAS="bundled") == "bundled"


@pytest.mark.parametrize("module", ["engine.engine", "models.load", "numerics.masks", "train.fit"])
def test_every_door_to_mlx_loads_the_blas_first(module):
    code = f"import sys, dspark_batch.{module}"
    assert active(code) == active("pass")
