"""The laws Losslessness and Independence, in this process's BLAS and in the other one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from exactness import PAIRS, SLOTS, differences

from dspark_batch import blas

SMALL = (
    "qwen3_vanilla",
    "gemma4_vanilla",
    "qwen35_dflash",
    "qwen35_dflash_b16",
    "qwen35_moe_dflash",
)  # the bundled pair takes a minute: the slow set
SCRIPT = Path(__file__).parent / "exactness.py"
OTHER = {"openblas": "bundled", "bundled": "auto"}


@pytest.mark.parametrize(
    ("all_slots", "name"), [(SLOTS[number % 2 :: 2], name) for number, name in enumerate(SMALL)]
)
def test_every_way_through_the_engine_gives_the_bytes_of_the_baseline(all_slots, name):
    assert list(differences(name, 0, all_slots)) == []


@pytest.mark.skipif(blas.LOADED.kind not in OTHER, reason="this machine has no other BLAS")
@pytest.mark.parametrize(
    "name", ["qwen3_vanilla", pytest.param("qwen35_dflash", marks=pytest.mark.slow)]
)
def test_so_it_does_with_the_other_blas(name):
    environment = os.environ | {"DSPARK_BATCH_BLAS": OTHER[blas.LOADED.kind]}
    command = [sys.executable, str(SCRIPT), name, "7"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *differ, last = said.stdout.splitlines()
    assert differ == []
    if last == f"blas {blas.LOADED.kind}":
        pytest.skip("this machine has no other BLAS")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", PAIRS)
def test_every_way_for_many_seeds(name, seed):
    assert list(differences(name, seed)) == []
