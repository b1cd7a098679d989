"""The benchmarks still run, at toy sizes, and the mistakes that they plant still have a place."""

import json
import pkgutil
import shutil
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest

import benchmarks
from benchmarks import throughput, turns
from benchmarks.common import busy_share
from benchmarks.planted_mistakes import ROOT, plant
from dspark_batch.pair import load_pair

MODULES = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}
PLANTED = {"planted_defects", "planted_mistakes"}
RUNS = {
    "attention": "--toy --layers 2",
    "drafter_bits": "--items 1 --bits 4",
    "equal_bits": "72x3x1x41 --slots 2",
    "exact": "--items 1 --dtype float32 --alone 1",
    "first_row": "--starts 1 --items 1",
    "first_token": "--pair toy --slots 2 --starts 1",
    "fleet": "--without-ray --items 400 --pair toy --slots 2 --items-per-worker 2 "
    "--answer-tokens 2",
    "hybrid": "--size toy --slots 2 --items-per-slot 1 --max-tokens 4 --compared 1 --dtype float32",
    "lookup": "--items 2 --slots 2",
    "long_context": "--toy --slots 1 --contexts 40 --width 2",
    "host": "--items 8 --job-items 8 --slots 2",
    "plans": "--items 3 --slots 2 --draft-lengths 0 7",
    "never_slower": "--items 2 --slots 2 --tokens 2 --draft-lengths 7",
    "one_digest": "--runs 1 --items 3 --blas auto",
    "prefix": "--items 2 --system-tokens 16 --own-tokens 8 --repeats 1 --dtype float32",
    "products": "--sizes 48x40 --rows 1 20 --turns 1",
    "round": "--toy --slots 2 --context 40 --capacity 64",
    "safe_rows": "--toy --shapes 2x0 --rounds 8 --grid",
    "sampling": "--items 1 --temperatures 1",
    "scale": "--toy --slots 2 --batch-sizes 2 --answer-tokens 8 --items-per-slot 1 --profiles math",
    "throughput": "--items 1 --repeats 1 --batch-sizes 1 --slots 1 --draft-lengths 7 "
    "--system-tokens 40 --dtype float32",
    "serve": "--items 3 --probes 2 --pause 0 --slots 2",
    "shared_prompt": "--items 4 --shared-tokens 70 --own-tokens 4 --answer-tokens 4 --turns 0 "
    "--draft-lengths 7 --dtype float32",
    "structured": "--items 2 --slots 2 --speed-items 1 --repeats 1",
    "tiny_card": "--per-kind 1 --slots 4",
}
LONG = {"first_row", "lookup", "one_digest", "scale", "serve", "structured"}  # seconds each


@pytest.fixture(autouse=True)
def _no_compiler():
    """On a CPU, mx.compile calls a C++ compiler, which takes longer than these few steps."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_benchmark_is_run_here_or_helps_one_that_is(name):
    has_main = hasattr(import_module(f"benchmarks.{name}"), "main")
    assert has_main == (name in RUNS or name in PLANTED)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in RUNS]
)
def test_it_prints_one_line_without_a_failure(name, tmp_path, monkeypatch, capsys):
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path))
    sizes = {"MAX_TOKENS": 8, "CHAIN": 1, "TIMES": 1, "GRID_SLOTS": (2,), "GRID_WIDTHS": (3,)}
    for name_of_size, small in sizes.items():
        monkeypatch.setattr(module, name_of_size, small, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *RUNS[name].split()])
    monkeypatch.chdir(tmp_path)
    module.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)
    assert '"failed"' not in line


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(mistake, id=mistake["name"])
        for name in sorted(PLANTED)
        for mistake in tomllib.loads((ROOT / "benchmarks" / f"{name}.toml").read_text())["mistake"]
    ],
)
def test_a_mistake_can_still_be_planted(mistake, tmp_path):
    source = Path("dspark_batch", mistake["file"])
    (tmp_path / source).parent.mkdir(parents=True)
    shutil.copy(ROOT / source, tmp_path / source)
    plant(mistake, tmp_path)
    assert (tmp_path / source).read_text() != (ROOT / source).read_text()


@pytest.mark.parametrize("asked", [1, 131, 132, 200])
def test_throughput_shares_what_was_asked_and_at_most_one_sentence_more(asked):
    pair = load_pair("tiny", dtype="float32")
    one, two = (throughput.shared_tokens(pair, n * throughput.SENTENCE) for n in (1, 2))
    shared = throughput.shared_tokens(pair, throughput.system_of(pair, asked))
    assert asked <= shared <= max(one, asked + two - one)


def test_throughput_gives_turns_to_the_best_of_either_side_and_to_the_automatic_plan():
    warm_up = {
        "mlx_lm_batch_1": (4.0, 4.0),
        "mlx_lm_batch_8": (2.0, 2.0),
        "slots_1_drafts_0": (1.8, 1.8),
        "slots_8_drafts_7": (1.0, 1.0),
        "slots_8_drafts_3": (1.6, 1.6),
        "slots_4_drafts_7": (5.0, 1.5),  # somebody else had the machine
        "speculation_auto": (5.0, 5.0),
    }
    assert throughput.near_the_best(warm_up) == [
        "mlx_lm_batch_8",
        "slots_8_drafts_7",
        "slots_8_drafts_3",
        "slots_4_drafts_7",
        "speculation_auto",
    ]


def test_who_left_early_is_not_the_best(monkeypatch):
    """It was seen while the machine was fast."""
    found = {
        "tokens_per_s": {"0": 190.0, "3": 230.0, "auto": 185.0},
        "left_early": ["3"],
        "best_fixed": "0",
        "ratio": 0.974,
        "identical": True,
    }
    monkeypatch.setattr(turns, "compete", lambda fixed, auto, work: found)
    told = turns.compete_often(dict, dict, [], 2)
    assert (told["best_fixed"], told["ratio"], told["ratios"]) == ("0", 0.974, [0.974, 0.974])


def test_throughput_says_what_the_host_took():
    assert throughput.stolen_share([0] * 8, [1, 1, 1, 9, 9, 0, 0, 1]) == 0.25
    assert throughput.stolen_share([0] * 8, [0] * 8) == 0


def test_how_busy_a_gpu_is_is_asked_of_the_card_of_this_process_alone(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    asked = tmp_path / "asked"
    told = f"for _ in 1 2 3 4; do echo ${{2}}0; done; : > {asked}; exec sleep 60"
    program.write_text(f"#!/bin/sh\n{told}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with busy_share() as share:
        deadline = time.monotonic() + 60
        while not asked.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert share() == 0.3
