"""Every job file that we give away runs as it stands, on the bundled pair."""

from datetime import date
from functools import partial
from pathlib import Path

import pytest
from small_jobs import rows_in

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
