"""Both halves together, on the bundled pair."""

import json

import pytest
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch import blas
from dspark_batch.engine.conformance import Conformance
from dspark_batch.engine.shapes import Shapes
from dspark_batch.errors import ModelError, UsageError
from dspark_batch.models.hub import Download
from dspark_batch.opening import open_pair
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec


@pytest.fixture
def any_conforms(monkeypatch):
    """Check no target: half precision is slow on CPUs."""
    found = Conformance(Shapes(), "bits", 0.0)
    monkeypatch.setattr("dspark_batch.engine.setup.conformance", lambda target: found)


@pytest.mark.usefixtures("any_conforms")
@pytest.mark.parametrize(("asked", "taken"), [(None, "bfloat16"), ("float16", "float16")])
def test_the_number_type_of_the_manifest_is_kept_unless_another_is_asked_for(asked, taken):
    spec = Spec(inputs=("in.jsonl",), out="out.jsonl", dtype=asked)
    manifest = {"identity": {"dtype": "bfloat16"}, "setup": {"blas_threads": None}}
    opened = open_pair(spec, manifest)
    assert opened.identity["dtype"] == taken


@pytest.mark.usefixtures("any_conforms")
def test_the_threads_of_the_manifest_are_kept_because_they_decide_bits(monkeypatch):
    asked = []
    monkeypatch.setattr(blas, "set_num_threads", asked.append)
    spec = Spec(inputs=("in.jsonl",), out="out.jsonl", dtype="float32")
    manifest = {"identity": {"dtype": "float32"}, "setup": {"blas_threads": 3}}
    open_pair(spec, manifest)
    assert asked == [3]


def test_the_manifest_says_how_the_job_decodes(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("one"))
    start(tmp_path, opener=open_pair, max_tokens=3, slots=2)
    manifest = json.loads((tmp_path / "out.jsonl.run/manifest.json").read_bytes())
    assert manifest["setup"].keys() == {
        *("plan", "step_shape", "divergence", "dtype", "most_positions"),
        *("machine", "blas_threads"),
    }
    assert manifest["setup"]["plan"]["slots"] == 2
    assert manifest["setup"]["step_shape"] is None
    assert len(manifest["fingerprint"]["fields"]["numerics"]) == 32


@pytest.fixture
def asked(monkeypatch):
    """Collect what would be loaded, and tell of a download on the way."""
    seen = {}

    def load(family, **options):
        options.pop("on_download")(Download("org/name", 1_500_000_000, 8_000_000_000))
        seen.update(options, family=family)
        raise ModelError("enough")

    monkeypatch.setattr("dspark_batch.pair.load_pair", load)
    return seen


@pytest.mark.parametrize(("bits", "asked_for"), [("auto", "auto"), ("stored", None), (8, 8)])
def test_every_option_of_a_model_reaches_the_loader(tmp_path, asked, bits, asked_for):
    write_lines(tmp_path / "in.jsonl", *prompts("one"))
    options = {
        "family": "qwen3",
        "target": "t@v1",
        "drafter": "d",
        "target_bits": 4,
        "dtype": "float16",
        "trust_remote_code": True,
    }
    spec = {"inputs": (f"{tmp_path}/in.jsonl",), "out": f"{tmp_path}/out.jsonl"} | options
    with pytest.raises(ModelError, match="enough"):
        run(Spec(**spec, drafter_bits=bits))
    assert asked == options | {"drafter_bits": asked_for}


@pytest.mark.usefixtures("asked")
def test_a_download_is_progress(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("one"))
    ticks = []
    spec = Spec(inputs=(f"{tmp_path}/in.jsonl",), out=f"{tmp_path}/out.jsonl")
    with pytest.raises(ModelError, match="enough"):
        run(spec, observe=ticks.append)
    assert [(t.stage, t.doing) for t in ticks] == [
        ("load", ""),
        ("load", "downloading org/name, 1.50 of 8.00 GB"),
    ]


def on_a_cpu(monkeypatch):
    import mlx.core as mx  # not before the BLAS

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(("chosen", "lines"), [("", 1), ("bundled", 0)])
def test_a_run_hints_at_openblas_unless_the_slow_one_was_chosen(
    tmp_path, monkeypatch, caplog, chosen, lines
):
    monkeypatch.setattr(blas, "LOADED", blas.Blas("bundled", "no OpenBLAS is installed"))
    monkeypatch.setattr(blas.sys, "platform", "linux")
    on_a_cpu(monkeypatch)
    monkeypatch.setenv("DSPARK_BATCH_BLAS", chosen)
    with pytest.raises(ModelError, match="enough"):
        open_pair(Spec(inputs=("in.jsonl",), out="out.jsonl"), None, lambda download: None)
    assert caplog.text.count("libopenblas0-pthread") == lines


def test_on_a_cpu_there_is_no_idle_device(monkeypatch):
    on_a_cpu(monkeypatch)
    opened = open_pair(Spec(inputs=("in.jsonl",), out="out.jsonl", dtype="float32"), None)
    assert opened.gauge().idle_s is None


def without_metrics(path):
    return [row | {"metrics": None} for row in rows_in(path)]


def test_an_interrupted_job_ends_with_the_rows_of_one_that_was_not(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("one", "two"), b"nope", *prompts("three"))
    options = {"opener": open_pair, "max_tokens": 9, "dtype": "float32"}

    def interrupt(tick):
        if tick.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, observe=interrupt, **options)
    assert start(tmp_path, **options).resumed == 2
    start(tmp_path, out=f"{tmp_path}/calm.jsonl", **options)
    assert without_metrics(tmp_path / "out.jsonl") == without_metrics(tmp_path / "calm.jsonl")


def test_thinking_that_the_target_has_not_is_refused_before_it_is_loaded(tmp_path, asked):
    write_lines(tmp_path / "in.jsonl", *prompts("one"))
    spec = Spec(inputs=(f"{tmp_path}/in.jsonl",), out=f"{tmp_path}/out.jsonl", thinking="on")
    with pytest.raises(UsageError, match="the target's chat template has no thinking"):
        run(spec)
    assert not asked


def test_the_setting_of_thinking_is_part_of_what_answers():
    spec = Spec(inputs=("in.jsonl",), out="out.jsonl", dtype="float32")
    assert open_pair(spec, None).identity["thinking"] == "off"
