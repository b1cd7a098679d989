"""The picture of a step curve tells the class from the rest, and costs from seconds."""

import json
import sys

from benchmarks import step_curve
from dspark_batch.engine.machine import Machine
from dspark_batch.engine.scheduler import TargetPass
from dspark_batch.engine.shapes import Shapes

MACHINE = Machine(
    Shapes(steps=((2, 8),)),
    numerics="",
    target=(TargetPass(2, 8, 0.006),),
    others=(TargetPass(1, 1, 0.002), TargetPass(2, 1, 0.003)),
)


def test_costs_are_relative_to_one_token_of_one_slot():
    assert step_curve.curves(MACHINE) == {
        1: [(1, 1.0, False)],
        2: [(1, 1.5, False), (8, 3.0, True)],
    }


def test_the_record_of_another_machine_is_drawn_too(tmp_path, monkeypatch, capsys):
    record, picture = tmp_path / "machine.json", tmp_path / "curve.svg"
    record.write_text(json.dumps(MACHINE.to_json()))
    words = ["step_curve", "--machine", str(record), "-o", str(picture)]
    monkeypatch.setattr(sys, "argv", words)
    step_curve.main()
    assert "relative to one token of one slot" in picture.read_text()
    assert json.loads(capsys.readouterr().out)["machine"] == json.loads(record.read_text())
