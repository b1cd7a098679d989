"""The doctor finds what is wrong, says what to do, and tells no secret."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_batch import blas, device, doctor
from dspark_batch.cli.main import main
from dspark_batch.models import pairs


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """An empty Hub cache, no network, and a measurement that takes no time."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(doctor, "_MEASURE_S", 0.0)
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(blas, "LOADED", blas.Blas("other", "the system has it"))
    monkeypatch.setattr(blas, "identity", lambda: "OpenBLAS 0.3.31, kernel Zen, threads 1")
    monkeypatch.setattr(sys, "platform", "linux")


def test_a_sound_machine_is_usable_and_told_in_sections(tmp_path, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    sections = [line for line in out.splitlines() if not line.startswith(" ")]
    assert sections == ["software", "compute", "memory", "folders", "pairs", "All is well."]
    for word in ("python", "mlx-lm", "device", "GFLOPS", "OpenBLAS", str(tmp_path / "hub")):
        assert word in out
    assert "tiny             on disk: yes" in out
    assert "qwen3            on disk: no" in out


def test_a_token_is_never_shown(monkeypatch, capsys):
    assert doctor.diagnose().sections["folders"]["Hub login"].startswith("no;")
    monkeypatch.setenv("HF_TOKEN", "hf_abcSECRETdef")
    main(["doctor"])
    out = capsys.readouterr().out
    assert "Hub login        yes" in out
    assert "SECRET" not in out


def test_the_speed_is_that_of_the_product(monkeypatch):
    ticks = iter([0.0, 0.0, 0.5, 2.0, 2.0])  # begins; one product of half a second; over
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(ticks))
    assert doctor._gflops() == pytest.approx(2 * 1024**3 / 0.5 / 1e9)


def on_a_cpu(monkeypatch):
    import mlx.core as mx  # not before the BLAS

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))


def test_the_slow_blas_is_a_hint_and_no_fault(monkeypatch, capsys):
    monkeypatch.setattr(blas, "LOADED", blas.Blas("bundled", "no OpenBLAS is installed"))
    on_a_cpu(monkeypatch)
    assert main(["doctor"]) == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hint")]
    assert "slow reference one: no OpenBLAS is installed." in hint
    assert "pip install 'dspark-batch[cpu]', or apt install libopenblas0-pthread" in hint


def test_the_blas_is_told_with_its_kernel_its_threads_and_why(monkeypatch, capsys):
    on_a_cpu(monkeypatch)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "blas             OpenBLAS 0.3.31, kernel Zen, threads 1" in out
    assert "because          the system has it" in out


def test_cores_that_no_process_uses_are_told(monkeypatch, capsys):
    on_a_cpu(monkeypatch)
    monkeypatch.setattr(device, "num_cores", lambda: 16)
    monkeypatch.setattr(blas, "num_threads", lambda: 2)
    assert main(["doctor"]) == 0
    said = "cores            16, of which a process computes with 2; --workers N starts N processes"
    assert said in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody says which cores are ours")
def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 9})
    assert device.num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert device.num_cores() == 64


def test_the_slow_blas_is_no_news_to_who_chose_it(monkeypatch):
    monkeypatch.setattr(blas, "LOADED", blas.Blas("bundled", "DSPARK_BATCH_BLAS chose it"))
    monkeypatch.setenv("DSPARK_BATCH_BLAS", "bundled")
    assert not doctor.diagnose().hints


def wrong(capsys):
    assert main(["doctor"]) == 1
    *_, problem, last = capsys.readouterr().out.splitlines()
    assert last == "Problems: 1."
    return problem.removeprefix("wrong: ")


def test_a_machine_without_mlx_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    problem = wrong(capsys)
    assert problem.startswith("MLX does not load (")
    assert "pip install 'dspark-batch[cpu]', or [cuda13] for an NVIDIA GPU" in problem


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "file" / "own"))
    assert wrong(capsys) == (
        f"{tmp_path}/file/own: cannot be written. Name another folder in DSPARK_BATCH_CACHE."
    )


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    problems = doctor.diagnose().problems
    assert problems[0].startswith(f"{tmp_path}/hub: 0.0 GB left on its disk, expected 1 GB.")
    assert len(problems) == 2  # both folders


def test_a_damaged_bundled_pair_must_be_installed_again(tmp_path, monkeypatch, capsys):
    known = pairs.KNOWN_PAIRS["tiny"]
    broken = tmp_path / "target"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        content = (Path(known.target) / name).read_bytes()
        (broken / name).write_bytes(content[:-1] if name != "config.json" else content)
    changed = replace(known, target=str(broken))
    monkeypatch.setitem(pairs.KNOWN_PAIRS, "tiny", changed)
    problem = wrong(capsys)
    assert f"{broken / 'model.safetensors'}: " in problem
    assert problem.endswith("It belongs to this package: install dspark-batch again.")


def test_forgetting_drops_what_is_kept_and_says_so(tmp_path, capsys):
    folder = tmp_path / "own" / "machines"
    folder.mkdir(parents=True)
    (folder / "verdicts-a.json").write_text("{}")
    (folder.parent / "confidence.json").write_text("{}")  # calibration is somebody's work
    assert main(["doctor", "--forget"]) == 0
    assert capsys.readouterr().out.startswith(f"forgot 1 file in {folder}\n")
    assert (folder.parent / "confidence.json").exists()
    assert not list(folder.iterdir())
    assert main(["doctor", "--forget"]) == 0
    assert capsys.readouterr().out.startswith("forgot 0 files")


def test_what_cannot_be_dropped_is_named(tmp_path, capsys):
    (tmp_path / "own" / "machines" / "folder").mkdir(parents=True)
    assert main(["doctor", "--forget"]) == 2
    assert f"{tmp_path}/own/machines/folder: cannot be dropped" in capsys.readouterr().err
