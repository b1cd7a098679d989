"""What is pure in the race against other engines, and its protocol with a toy engine."""

import io
import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from benchmarks.common import ROOT
from benchmarks.peers.__main__ import close_to_best, ours_over, table
from benchmarks.peers.engines import beginning
from benchmarks.peers.pair import write_pair
from benchmarks.peers.protocol import Engine, EngineError, serve

TOY = """
import os, sys
from benchmarks.peers.protocol import serve
def add(a, b):
    return {"sum": a + b}
serve(sys.stdin, sys.stdout, {"add": add, "end": lambda: os._exit(3)})
"""


@pytest.fixture
def engine(tmp_path):
    with (tmp_path / "log").open("w") as log:
        engine = Engine([sys.executable, "-c", TOY], {**os.environ, "PYTHONPATH": str(ROOT)}, log)
        yield engine
        engine.close()


def test_an_engine_answers_says_what_it_cannot_do_and_stays(engine):
    assert engine.ask("add", a=1, b=2) == {"sum": 3}
    with pytest.raises(EngineError, match="TypeError"):
        engine.ask("add", a=1, b="2")
    assert engine.ask("add", a=3, b=4) == {"sum": 7}


def test_the_end_of_an_engine_is_an_error_of_its_turn(engine):
    with pytest.raises(EngineError, match="status 3"):
        engine.ask("end")
    with pytest.raises(EngineError, match="status 3"):
        engine.ask("add", a=1, b=2)


def test_each_message_gets_one_line():
    replies = io.StringIO()
    serve(['{"do": "ids", "n": 2}\n', '{"do": "fly"}\n'], replies, {"ids": lambda n: {"ids": [n]}})
    answered, refused = map(json.loads, replies.getvalue().splitlines())
    assert answered == {"ids": [2]}
    assert refused == {"error": "KeyError: 'fly'"}


def test_what_prompts_begin_with():
    assert beginning([[5, 6, 7], [5, 6, 7, 1], [5, 6, 2]]) == [5, 6]
    assert beginning([[1], [2]]) == []


def reply(wall, processor):
    return {"wall_s": wall, "processor_s": processor, "ids": []}


def test_those_take_turns_who_may_be_the_best_of_their_engine_by_either_clock():
    first = {"a 1": reply(4, 9), "a 2": reply(9, 4), "a 3": reply(9, 9), "a 4": reply(4.1, 9)}
    assert close_to_best(first | {"ours 1": reply(99, 99)}) == {"a 1", "a 2", "a 4", "ours 1"}


def test_our_better_side_is_compared_with_the_best_of_each_engine_by_medians():
    runs = {
        "ours x": [reply(2, 1), reply(2, 1), reply(50, 1)],
        "ours y": [reply(3, 1)],
        "a 1": [reply(3, 1), reply(3, 1), reply(0, 1)],
        "a 2": [reply(4, 1)],
    }
    assert ours_over(runs, "wall_s") == {"ours": "ours x", "a 1": 1.5}


def test_the_table_has_a_line_for_everybody_and_for_who_is_left_out():
    speed = {"ours x": {"runs": 5, "median": 10.2, "min": 9, "max": 11}}
    result = {
        "tokens_per_wall_s": speed,
        "tokens_per_processor_s": speed,
        "differences": {"ours x": []},
        "left_out": {"a": "no Metal"},
        "ours_over": {"wall_s": {"ours": "ours x"}},
    }
    assert table(result).splitlines()[2:4] == [
        "| ours x | 5 | 10 (9 to 11) | 10 (9 to 11) | 0 |",
        "left out: a: no Metal",
    ]


def test_the_copy_of_the_pair_says_the_same_in_float32(tmp_path):
    write_pair(tmp_path)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    weights = mx.load(str(tmp_path / "drafter" / "model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {mx.float32}


@pytest.mark.slow
def test_a_race_of_ours_alone(tmp_path):
    words = ["--environments", str(tmp_path), "--engines", "--items", "2", "--max-tokens", "4"]
    command = [sys.executable, "-m", "benchmarks.peers", *words, "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["left_out"] == {}
    assert result["same_ids_in_every_turn"]
