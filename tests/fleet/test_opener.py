"""What people ask of a fleet that cannot be: one sentence each, before anything is loaded."""

import sys
from datetime import date
from types import SimpleNamespace

import pytest
from engines import WORDS
from small_jobs import prompts, write_lines

from dspark_batch.cli.main import main
from dspark_batch.errors import UsageError
from dspark_batch.fleet.opener import open_fleet
from dspark_batch.spec.job_file import read_job
from dspark_batch.spec.spec import Spec


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", *prompts("a"))


def said(capsys, *words):
    assert main(["run", "in.jsonl", "-o", "out.jsonl", *words]) == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


def spec(**options):
    return Spec(inputs=("in.jsonl",), out="out.jsonl", **options)


def refusal(**options):
    with pytest.raises(UsageError) as error:
        open_fleet(spec(**options), None, words=lambda spec: WORDS)
    return str(error.value)


@pytest.mark.parametrize("words", [["--workers", "0"], ["--workers", "many"]])
def test_a_number_of_workers_is_1_or_more_or_auto(words, capsys):
    assert "--workers" in said(capsys, *words)


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "dspark_batch.fleet.cluster", raising=False)
    assert "pip install 'dspark-batch[ray]'" in said(capsys, "--workers", "2")


def test_one_worker_is_this_process_and_needs_no_ray(monkeypatch):
    assert not spec(workers=1).is_fleet
    assert not spec().is_fleet
    assert spec(workers=2).is_fleet
    assert spec(workers="auto").is_fleet
    assert spec(ray="auto").is_fleet


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "mlx", '{"mlx": 0}', '{"mlx": -1}', '{"mlx": "a"}', '{"mlx": null}']
)
def test_resources_of_a_worker_are_names_with_amounts(text):
    with pytest.raises(UsageError, match=r"worker_resources is .*expected names with an amount"):
        spec(ray="auto", worker_resources=text)


def test_resources_of_a_worker_are_about_a_cluster():
    with pytest.raises(UsageError, match="about a running cluster"):
        spec(workers=2, worker_resources='{"mlx": 1}')


def test_a_job_file_may_name_workers(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('inputs = ["in.jsonl"]\nout = "out.jsonl"\nworkers = "auto"\n')
    assert Spec(**read_job(path, date(2025, 3, 9)) | {"inputs": ("in.jsonl",)}).workers == "auto"


@pytest.fixture
def cluster():
    """The file that knows Ray; nothing here begins it."""
    pytest.importorskip("ray")
    from dspark_batch.fleet import cluster

    return cluster


def test_there_are_no_more_workers_than_processors(monkeypatch, cluster):
    monkeypatch.setattr(cluster, "_processors", lambda: ("cores", 4))
    assert refusal(workers=5) == (
        "--workers 5: this machine has 4 cores, and a worker takes one; name 1 to 4."
    )
    assert "there is none here; name a number, 1 to 4" in refusal(workers="auto")
    monkeypatch.setattr(cluster, "_processors", lambda: ("GPUs", 8))
    assert "--workers 9: this machine has 8 GPUs" in refusal(workers=9)


def test_a_cluster_that_does_not_answer_is_named(cluster):
    assert refusal(ray="127.0.0.1:1").startswith("--ray 127.0.0.1:1: no Ray answers there")


@pytest.mark.parametrize("address", ["somewhere", "ray://head:10001", ""])
def test_an_address_is_a_host_and_a_port(cluster, address):
    assert refusal(ray=address).startswith(f"--ray {address}: ")


@pytest.mark.parametrize(
    ("options", "has", "expected"),
    [
        ({}, {"CPU": 8, "GPU": 3}, 3),
        ({"workers": 2}, {"CPU": 8, "GPU": 3}, 2),
        ({"workers": 2}, {"CPU": 8}, 2),
        ({}, {"CPU": 8}, "and the cluster has 0; name a number"),
        ({"workers": 4}, {"CPU": 8, "GPU": 3}, "room for 3, where each takes GPU 1"),
        ({"worker_resources": '{"mlx": 2}'}, {"CPU": 8, "mlx": 5}, 2),
        ({"worker_resources": '{"mlx": 2}', "workers": 1}, {"CPU": 8}, "room for 0"),
    ],
)
def test_a_cluster_has_as_many_workers_as_it_has_room_for(
    cluster, monkeypatch, options, has, expected
):
    fake = SimpleNamespace(cluster_resources=lambda: has)
    monkeypatch.setattr(cluster, "ray", fake)
    asked = spec(ray="auto", **options)
    if isinstance(expected, int):
        assert cluster._workers_there(asked, cluster._needs_there(asked)) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            cluster._workers_there(asked, cluster._needs_there(asked))
