"""What a person sees of a training."""

import io
from importlib import import_module

import pytest

from dspark_batch.cli import main
from dspark_batch.cli.curves import Curves, LessonLines, spark
from dspark_batch.train.training import Asked, Lesson, Training

REPORT = {"rounds": 10, "tokens": 20, "accept_length": 2.0, "accept_rate": [0.6, 0.4]}
BEFORE = REPORT | {"accept_length": 1.5}
TRAINING = Training(
    to="d",
    about={"kind": "dspark", "steps": 1200},
    answers=1000,
    held_out=50,
    left_out={"of one token": 3},
    before={"all": BEFORE},
    after={"all": REPORT},
)


@pytest.fixture
def asked(monkeypatch):
    """What the command asks for, without training anything."""
    seen = {}

    def train(outs, to, asked, **how):
        seen.update(outs=outs, to=to, asked=asked, **how)
        how["observe"](Lesson("training", 1, 2, [{"loss": 1.25, "accept_length": 1.1}]))
        return TRAINING

    module = import_module("dspark_batch.train_drafter")
    monkeypatch.setattr(module, "train_drafter", train)
    return seen


def test_options_reach_the_training_and_its_numbers_are_told(asked, capsys):
    words = ["train-drafter", "a.jsonl", "b.jsonl", "-o", "d", "--taps", "1,7", "--rank", "0"]
    assert main.main([*words, "--kind", "dflash", "--max-runtime", "45m", "--by", "kind"]) == 0
    assert (asked["outs"], asked["to"]) == (("a.jsonl", "b.jsonl"), "d")
    assert asked["asked"] == Asked(kind="dflash", taps=(1, 7), rank=0, by="kind")
    assert asked["max_runtime"] == "45m"
    told = capsys.readouterr()
    assert "d: dspark, learnt from 1,000 answers in 1,200 steps; measured on 50 others." in told.out
    assert "Left out: 3 rows of one token." in told.out
    assert "all         20      1.50    2.00           0.60 0.40" in told.out
    assert "step 1 of 2 · loss 1.250 · accept length 1.10 expected" in told.err


def test_taps_that_are_no_numbers_are_refused(asked, capsys):
    assert main.main(["train-drafter", "a.jsonl", "-o", "d", "--taps", "1,x"]) == 2
    assert "--taps is '1,x', expected layer numbers such as 1,7,14." in capsys.readouterr().err


def test_a_log_has_a_line_when_something_begins_and_every_30_s():
    now, stream = [0.0], io.StringIO()
    show = LessonLines(stream, clock=lambda: now[0])
    curve = [{"loss": 1.0, "accept_length": 2.0}]
    for second, lesson in enumerate(
        [Lesson("gathering"), *(Lesson("training", n, 9, curve) for n in range(1, 8))]
    ):
        now[0] = second * 10.0
        show(lesson)
    lines = stream.getvalue().splitlines()
    assert [line.partition(" · ")[0] for line in lines] == [
        *("gathering", "step 1 of 9", "step 4 of 9", "step 7 of 9")
    ]


def test_the_curves_say_that_the_training_is_stopping():
    said = [""]
    curves = Curves(lambda: said[0])
    curves(Lesson("training", 1, 2, [{"loss": 1.25, "accept_length": 1.1}]))
    assert len(curves._frame().plain.splitlines()) == 3
    said[0] = "stopping"
    assert curves._frame().plain.splitlines()[3:] == ["stopping"]


def test_a_curve_is_as_wide_as_a_terminal():
    assert spark([3.0, 2.0, 1.0]) == "█▅▁"
    assert len(spark(list(range(1000)))) == 50
    assert spark([1.0, 1.0]) == "▁▁"
