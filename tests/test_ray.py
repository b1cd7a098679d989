"""A stage of a Ray Data pipeline answers as the command line does."""

import importlib
import os
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FakeSteps, fake_opener
from small_jobs import rows_in, start

from dspark_batch.errors import ModelError, UsageError
from dspark_batch.opening import open_with
from dspark_batch.pair import load_pair

ray = pytest.importorskip("ray")
stage = importlib.import_module("dspark_batch.ray")

pytestmark = pytest.mark.filterwarnings("ignore::Warning:ray.*")  # of its own parts

OPTIONS = {"max_tokens": 16, "temperature": 0.7, "seed": 3}


def write_prompts(folder, count=8):
    system = {"role": "system", "content": "Answer in one word."}
    table = pa.table(
        {
            "custom_id": [f"q-{n}" for n in range(count)],
            "messages": [
                [system, {"role": "user", "content": f"Name the number {n}."}]
                for n in range(count - 1)
            ]
            + [None],  # cannot be asked
            "n": pa.array([*range(count - 1), None], pa.uint8()),
        }
    )
    path = folder / "in" / "prompts.parquet"
    path.parent.mkdir()
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def tiny():
    return partial(open_with, load_pair("tiny", dtype="float32"))


def without_metrics(rows):
    return [
        {name: value for name, value in row.items() if name not in ("metrics", "error")}
        for row in rows
    ]


def test_a_worker_answers_a_table_as_a_job_does(tmp_path, tiny):
    path = write_prompts(tmp_path)
    out = str(tmp_path / "out.parquet")
    start(tmp_path, inputs=(str(path),), out=out, opener=tiny, **OPTIONS)
    expected = pq.read_table(out)
    answers = stage.Answers(stage.GenerateConfig(**OPTIONS).spec, tiny)
    table = answers(pq.read_table(path))
    answers.close()
    assert without_metrics(table.to_pylist()) == without_metrics(expected.to_pylist())
    assert table.schema.field("n").type == pa.uint8()
    assert sorted(table.column_names) == sorted(expected.column_names)
    assert table["error"].to_pylist()[-1]["message"].startswith("row q-7: ")


def worker(steps=None, **options):
    def open_engine(spec, manifest):
        return fake_opener(steps or FakeSteps())(spec, manifest)

    return stage.Answers(stage.GenerateConfig(**options).spec, open_engine)


def test_a_row_without_a_name_is_called_by_what_it_is():
    answers = worker()
    first = answers(pa.table({"prompt": ["a", "b"]})).to_pylist()
    second = answers(pa.table({"prompt": ["b"]})).to_pylist()
    answers.close()
    assert first[1]["custom_id"] == second[0]["custom_id"] != first[0]["custom_id"]
    assert len(first[1]["custom_id"]) == 33


def test_an_empty_table_gets_the_columns():
    answers = worker()
    table = answers(pa.table({"prompt": pa.array([], pa.string())}))
    answers.close()
    assert (table.num_rows, table.schema.field("completion").type) == (0, pa.string())


def test_a_column_with_one_of_our_names_is_refused():
    answers = worker()
    with pytest.raises(UsageError, match="the rows have a column `status`, which is one of ours"):
        answers(pa.table({"prompt": ["a"], "status": [1]}))
    answers.close()


def test_a_pair_that_cannot_be_loaded_is_an_error_and_no_death():
    def refuses(spec, manifest):
        raise ModelError("no such pair")

    with pytest.raises(ModelError, match="no such pair"):
        stage.Answers(stage.GenerateConfig().spec, refuses)


def test_an_engine_that_dies_ends_the_process_so_that_ray_takes_another(monkeypatch, capfd):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    answers = worker(FakeSteps(dies_on="kills"))
    with pytest.raises(RuntimeError, match="the engine broke at kills"):
        answers(pa.table({"prompt": ["a", "kills"]}))
    deadline = time.monotonic() + 10
    while len(ends) < 2 and time.monotonic() < deadline:  # the hub's thread says it, too
        time.sleep(0.001)
    assert ends == [1, 1]
    assert "RuntimeError: the engine broke at kills" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concurrency": 0}, "concurrency is 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"tempo": 1}, "tempo is no option here"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_options_that_are_impossible_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        stage.GenerateConfig(**options)


@pytest.mark.parametrize("missing", ["ray", "ray.data"])
def test_without_ray_the_import_says_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "dspark_batch.ray")
    with pytest.raises(ImportError) as error:
        importlib.import_module("dspark_batch.ray")
    said = f"dspark_batch.ray needs {missing}: pip install 'dspark-batch[ray]'"
    assert str(error.value) == said


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_pipeline_over_parquet_answers_as_the_command_line_does(tmp_path, tiny):
    path = write_prompts(tmp_path)
    out = str(tmp_path / "out.parquet")
    start(tmp_path, inputs=(str(path),), out=out, opener=tiny, **OPTIONS)
    processor = stage.build_processor(
        stage.GenerateConfig(dtype="float32", batch_size=3, **OPTIONS),
        postprocess=lambda row: row | {"length": len(row["completion"] or "")},
    )
    processor(ray.data.read_parquet(str(path.parent))).write_parquet(str(tmp_path / "answers"))
    rows = [row for each in sorted((tmp_path / "answers").iterdir()) for row in rows_in(each)]
    rows.sort(key=lambda row: row["custom_id"])
    expected = without_metrics(rows_in(Path(out)))
    names = expected[0].keys()
    assert [{name: row[name] for name in names} for row in rows] == expected
    assert [row["length"] for row in rows] == [len(row["completion"] or "") for row in expected]
    assert [row["status"] for row in rows] == ["succeeded"] * 7 + ["errored"]
