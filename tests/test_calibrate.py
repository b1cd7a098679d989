"""From the log of a run to the threshold of the next one."""

import os

import pytest
from fakes import FakeEngine
from golden_cases import GOLDEN, load_case
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.calibrate import calibrate
from dspark_batch.cli.main import main
from dspark_batch.device import cache_folder
from dspark_batch.drafters.calibration import (
    calibration_path,
    keep_temperatures,
    kept_temperatures,
)
from dspark_batch.engine.engine import Engine
from dspark_batch.errors import ModelError, UsageError
from dspark_batch.opening import Opened
from dspark_batch.pair import load_pair
from dspark_batch.types import Item, Request


def open_tiny(spec, manifest):
    pair = load_case("qwen3_vanilla").pair
    engine = Engine(pair, slots=3, log_confidence=spec.log_confidence)
    return Opened(engine, letters, pair.config.context_length, pair.config.identity)


def letters(messages):
    return [ord(c) for c in messages[-1]["content"]]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The output of a small run that logged its confidences."""
    folder = tmp_path_factory.mktemp("logged")
    write_lines(
        folder / "in.jsonl", *prompts(*["one", "two", "three", "four", "five", "six"]), {"id": 3}
    )
    start(folder, opener=open_tiny, max_tokens=24, log_confidence=True)
    return folder / "out.jsonl"


class Sure(FakeEngine):
    """Drafts one token a round, always as sure of it; every second one stays."""

    logit = 0.0

    def _outcome(self, request):
        return (
            super()
            ._outcome(request)
            ._replace(
                accept_lengths=(2, 1) * 10 + (1,),
                num_accepted=(1, 0) * 10 + (0,),
                num_drafted=(1,) * 21,
                confidence=((self.logit,),) * 21,
            )
        )


def log_of(engine, folder):
    def open_engine(spec, manifest):
        config = load_case("qwen3_vanilla").pair.config
        return Opened(engine, letters, config.context_length, config.identity)

    write_lines(folder / "in.jsonl", *prompts("one", "two", "three", "four"))
    start(folder, opener=open_engine, log_confidence=True)
    return str(folder / "out.jsonl")


def same_weights(**options):
    return load_pair(
        target=str(GOLDEN / "targets" / "qwen3_tiny"),
        drafter=str(GOLDEN / "qwen3_vanilla" / "drafter"),
        dtype="float32",
        **options,
    )


def test_rows_tell_the_confidence_of_every_verified_draft(logged):
    assert rows_in(logged)[-1]["metrics"] is None  # a failure
    for row in rows_in(logged)[:-1]:
        log = row["metrics"]["speculative_decoding"]
        assert [len(drafts) for drafts in log["per_step_confidence"]] == log["per_step_drafted"]
    recorded = load_case("qwen3_vanilla")["greedy0.rounds.confidence_logits"].tolist()
    request = Request(Item(0, "0", "d", "t:1"), load_case("qwen3_vanilla").prompt("greedy0"), 30)
    pair = load_case("qwen3_vanilla").pair
    (answer,) = Engine(pair, log_confidence=True).generate([request])
    assert answer.confidence[0] == pytest.approx(recorded[0], abs=1e-3)


def test_rows_without_the_log_are_as_they_were(logged, tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("one"))
    start(tmp_path, opener=open_tiny, max_tokens=24)
    (row,) = rows_in(tmp_path / "out.jsonl")
    assert row["metrics"]["speculative_decoding"]["per_step_confidence"] is None
    assert row["token_ids"] == rows_in(logged)[0]["token_ids"]
    with pytest.raises(UsageError, match="Run with --log-confidence"):
        calibrate(str(tmp_path / "out.jsonl"))


def test_a_calibration_is_found_wherever_the_same_weights_are_loaded(tmp_path, cache):
    assert same_weights().config.confidence_temperatures is None
    engine = Sure()
    engine.logit = 1.0  # 73 percent, and half of the drafts stay
    fitted = calibrate(log_of(engine, tmp_path))
    assert fitted.temperatures == (4.0,)
    assert fitted.error_before == pytest.approx((0.231,), abs=1e-3)
    assert fitted.error_after == pytest.approx((0.062,), abs=1e-3)
    assert fitted.path.is_relative_to(cache)
    pair = same_weights()
    assert pair.config.confidence_temperatures == fitted.temperatures
    assert pair.config.identity["calibration"] == str(fitted.temperatures)
    other = load_case("qwen3_gated").pair.config.identity
    assert calibration_path(other) != fitted.path


def test_the_last_round_of_an_answer_is_no_evidence(tmp_path, cache):
    # A limit may have cut it, so that accepted drafts are missing from its count.
    assert calibrate(log_of(Sure(), tmp_path)).num_rounds == 4 * 20


def test_confidences_that_are_right_are_left_alone(tmp_path, cache, capsys):
    fitted = calibrate(log_of(Sure(), tmp_path))
    assert (fitted.temperatures, fitted.path) == ((1.0,), None)
    assert not cache.exists()
    assert main(["calibrate", str(tmp_path / "out.jsonl")]) == 0
    assert "not kept, the error does not fall" in capsys.readouterr().out


def test_the_threshold_is_compared_with_calibrated_confidences(cache):
    def num_drafted(temperature, threshold):
        pair = same_weights()
        keep_temperatures(pair.config.identity, [temperature] * 7)
        request = Request(Item(0, "0", "d", "t:1"), load_case("qwen3_vanilla").prompt("greedy0"), 9)
        engine = Engine(same_weights(), confidence_threshold=threshold)
        (answer,) = engine.generate([request])
        return answer.token_ids, sum(answer.num_drafted)

    ids, as_they_are = num_drafted(1.0, 0.9)
    # sigmoid(z / 2) < t just where sigmoid(z) < sigmoid(2 logit(t)); 0.75 becomes 0.9.
    assert num_drafted(2.0, 0.75) == (ids, as_they_are)
    assert num_drafted(2.0, 0.9)[1] < as_they_are


def test_the_command_shows_the_error_by_position_before_and_after(logged, cache, capsys):
    assert main(["calibrate", str(logged)]) == 0
    heading, *positions, last = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "position"
    assert [line.split()[0] for line in positions] == list("1234567")
    assert all(line.count("%") == 2 for line in positions)
    assert last.startswith("from ")


def test_no_run_and_a_damaged_file_say_so(tmp_path, cache):
    with pytest.raises(UsageError, match=r"out.jsonl.run: no run here"):
        calibrate(str(tmp_path / "out.jsonl"))
    path = keep_temperatures(load_case("qwen3_vanilla").pair.config.identity, [1.0])
    path.write_text('{"temperatures": [0]}')
    with pytest.raises(ModelError, match="expected positive numbers"):
        same_weights()
    path.write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        same_weights()


def test_a_cache_folder_that_cannot_be_read_holds_nothing(tmp_path, monkeypatch):
    identity = {"target": "a", "drafter": "b"}
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "file"))
    assert kept_temperatures(identity) is None

    def refuses(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "whole"))
    keep_temperatures(identity, [1.0])
    for name in ("read_bytes", "is_file"):
        with monkeypatch.context() as denied:
            denied.setattr(type(tmp_path), name, refuses)
            assert kept_temperatures(identity) is None


def test_a_pipe_in_the_place_of_a_calibration_is_not_waited_for(tmp_path, monkeypatch):
    identity = {"target": "a", "drafter": "b"}
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path))
    path = keep_temperatures(identity, [1.0])
    path.unlink()
    os.mkfifo(path)
    assert kept_temperatures(identity) is None


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch):
    def fails():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DSPARK_BATCH_CACHE")
    monkeypatch.setattr("pathlib.Path.home", fails)
    with pytest.raises(UsageError, match="in DSPARK_BATCH_CACHE"):
        cache_folder()


def test_a_drafter_without_confidences_cannot_be_logged():
    pair = load_case("qwen3_vanilla_noconf").pair
    with pytest.raises(UsageError, match="--log-confidence: this drafter has no confidence head"):
        Engine(pair, log_confidence=True)
    Engine(pair, log_confidence=True, draft_length=0, confidence_threshold=0.5)


def test_a_threshold_without_drafts_decodes_plainly():
    case = load_case("qwen3_vanilla")
    request = Request(Item(0, "0", "d", "t:1"), case.prompt("greedy0"), 5)
    engine = Engine(case.pair, draft_length=0, confidence_threshold=0.5, log_confidence=True)
    (answer,) = engine.generate([request])
    assert list(answer.token_ids) == case.answer("greedy0")[:5]
    assert answer.confidence is None
