"""Every job file that we give away runs as it stands, on the bundled pair."""

import os
import subprocess
from datetime import date
from functools import partial
from pathlib import Path

import pytest
from small_jobs import rows_in

from dspark_batch.cli.run_command import run_command, spec_of
from dspark_batch.opening import open_with
from dspark_batch.pair import load_pair
from dspark_batch.run import run
from dspark_batch.spec.job_file import read_job
from dspark_batch.spec.spec import Spec

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.toml"))


@pytest.fixture(scope="module")
def open_engine():
    pair = load_pair("tiny", dtype="float32")

    return partial(open_with, pair)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_file_runs_as_it_stands(path, tmp_path, open_engine):
    job = read_job(path, date(2025, 3, 9))
    out = tmp_path / Path(job["out"]).name
    job |= {"out": str(out), "limit": 1, "max_tokens": 16, "deadline": None}
    report = run(Spec(**job), open_engine=open_engine)
    assert (report.exit_code, report.total) == (0, job.get("samples", 1))
    name = job.get("output_column", "completion")
    assert all(row[name] for row in rows_in(out))


def test_there_are_at_least_four():
    assert len(JOBS) >= 4


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_file_says_how_to_run_it(path):
    assert f"dspark-batch run jobs/{path.name}\n" in path.read_text()


@pytest.mark.parametrize(("code", "is_queued_again"), [(0, False), (1, False), (75, True)])
def test_the_script_for_slurm_runs_a_shard_and_queues_again_what_is_not_finished(
    tmp_path, code, is_queued_again
):
    for name, ends in (("dspark-batch", code), ("scontrol", 0)):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {name}.args\nexit {ends}\n')
        stub.chmod(0o755)
    slurm = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    script = Path(__file__).parents[1] / "jobs" / "slurm.sh"
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], cwd=tmp_path, env=os.environ | slurm | paths)
    assert done.returncode == code
    run, *words = (tmp_path / "dspark-batch.args").read_text().splitlines()
    with run_command.make_context("run", words) as context:
        assert context.params.pop("quiet")
        spec = spec_of(context, context.params)
    assert (run, spec.shard, spec.out) == ("run", "3/16", "parts/part-3.parquet")
    again = tmp_path / "scontrol.args"
    assert again.exists() == is_queued_again
    assert not is_queued_again or again.read_text() == "requeue\n77_3\n"
    assert "#SBATCH --array=1-16\n" in script.read_text()
