"""Whatever JSON a line holds, it has one row, and its values come out as they came in."""

import json
import random

import pytest
from small_jobs import rows_in, start, write_lines

from dspark_batch.output.export import export

PLAIN = ["null", "true", "1.5", '"é"', "0", "-1", str(2**63), str(2**64 - 1)]
ODD = ["NaN", "-Infinity", str(2**70), str(-(2**64)), '"\\ud83d x"']
NAMES = ['"a"', '"b"', '"\\ud83d"']


def value(chance, depth=0):
    kind = chance.randrange(10)
    inner = [value(chance, depth + 1) for _ in range(chance.randrange(3))] if depth < 3 else []
    if kind == 0:
        return f"[{','.join(inner)}]"
    if kind == 1:
        pairs = (f"{chance.choice(NAMES)}:{each}" for each in inner)
        return "{" + ",".join(pairs) + "}"
    return chance.choice(PLAIN if kind < 7 else ODD)


def line(chance):
    whole = f'{{"id":{value(chance, 3)},"prompt":"p","c":{value(chance)},"d":{value(chance)}}}'
    raw = whole.encode()
    return raw[: chance.randrange(1, len(raw))] if chance.random() < 0.2 else raw


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_odd_values_lose_no_row_and_change_nothing(tmp_path, seed, out):
    chance = random.Random(seed)
    lines = [line(chance) for _ in range(8)] + [b'{"prompt":"p"}']
    write_lines(tmp_path / "in.jsonl", *lines)
    start(tmp_path, out=f"{tmp_path}/{out}")
    export(f"{tmp_path}/{out}", f"{tmp_path}/copy.jsonl")
    rows = rows_in(tmp_path / "copy.jsonl")
    assert len(rows) == len(lines)
    for raw, row in zip(lines, rows, strict=True):
        if row["status"] == "succeeded" and out == "out.jsonl":
            came_in, came_out = json.loads(raw), row
            assert [json.dumps(came_out[name]) for name in came_in.keys() & {"c", "d"}] == [
                json.dumps(came_in[name]) for name in came_in.keys() & {"c", "d"}
            ]


def test_a_file_with_a_torn_line_alone_has_a_row_for_it(tmp_path):
    torn = b'{"id": "a", "prompt": "x"}'
    for size in range(1, len(torn)):
        write_lines(tmp_path / "in.jsonl", torn[:size])
        start(tmp_path, overwrite=True)
        [row] = rows_in(tmp_path / "out.jsonl")
        assert (row["status"], row["custom_id"] in ("#0", "a")) == ("errored", True)
