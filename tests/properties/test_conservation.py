"""The Conservation law: every record becomes exactly one row, in order, whatever it holds."""

import gzip
import json
import random

import pyarrow as pa
import pytest
from fakes import CONTEXT_LENGTH, FakeEngine, fake_answer, fake_render
from small_jobs import rows_in, start

from dspark_batch.types import Item, Request


def good(chance):
    record = {"prompt": chance.choice(["a", "b", "ü\u2028", " "]) * chance.randrange(1, 30)}
    if chance.random() < 0.3:
        record |= {"id": chance.randrange(5), "extra": [None, {"x": 1.5}]}
    return json.dumps(record, ensure_ascii=chance.random() < 0.5).encode()


def chat(chance):
    turns = [{"role": "user", "content": f"turn {n}"} for n in range(chance.randrange(1, 4))]
    return json.dumps({"messages": turns, "custom_id": f"chat-{chance.randrange(3)}"}).encode()


def bad(chance):
    return chance.choice(
        [
            *(
                b"{",
                b"[]",
                b"null",
                b'{"prompt":NaN}',
                b'{"prompt":"\xff"}',
                b"\0",
                b"\xef\xbb\xbf{}",
            ),
            *(b"{}", b'{"prompt":""}', b'{"prompt":1}', b'{"prompt":"a","messages":[]}'),
            b'{"prompt":"' + b"x" * CONTEXT_LENGTH + b'"}',
        ]
    )


def write_parts(folder, lines, chance):
    """Spread lines over three files of different formats, with blank lines between."""
    cuts = sorted(chance.randrange(len(lines) + 1) for _ in range(2))
    parts = lines[: cuts[0]], lines[cuts[0] : cuts[1]], lines[cuts[1] :]
    raw = [
        b"".join(line + chance.choice([b"\n", b"\r\n", b"\n\n"]) for line in part) for part in parts
    ]
    (folder / "1.jsonl").write_bytes(raw[0])
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(raw[1]))
    (folder / "3.jsonl.zst").write_bytes(pa.compress(raw[2], "zstd", asbytes=True))


def expected_text(line):
    """What the fake engine answers; None: nothing."""
    try:
        record = json.loads(line, parse_constant=int)  # NaN is an error
    except ValueError:
        return None
    turns = expected_turns(record) if isinstance(record, dict) else None
    ids = tuple(fake_render(turns or []))
    if not 0 < len(ids) < CONTEXT_LENGTH:
        return None
    return fake_answer(Request(Item(0, "", "", ""), ids, min(512, CONTEXT_LENGTH - len(ids)))).text


def expected_turns(record):
    prompt, turns = record.get("prompt"), record.get("messages")
    if not isinstance(prompt, str) or turns is not None:
        return None if "prompt" in record else turns
    return [{"role": "user", "content": prompt}] if prompt else None


@pytest.mark.parametrize("seed", range(12))
def test_every_record_becomes_exactly_one_row_in_order(tmp_path, seed):
    chance = random.Random(seed)
    lines = [chance.choice([good, good, chat, bad])(chance) for _ in range(chance.randrange(1, 60))]
    write_parts(tmp_path, lines, chance)
    out = tmp_path / chance.choice(["out.jsonl", "out.parquet"])
    options = {"inputs": (f"{tmp_path}/?.jsonl*",), "out": str(out), "fsync_every": 50}

    for dies_after in sorted(chance.randrange(len(lines)) for _ in range(2)):
        engine = FakeEngine(chance.randrange(1, 5), dies_after=dies_after // 3)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, engine=engine, **options)
    report = start(tmp_path, engine=FakeEngine(chance.randrange(1, 5)), **options)

    rows = rows_in(out)
    assert [row["completion"] for row in rows] == [expected_text(line) for line in lines]
    assert [row["error"] is None for row in rows] == [row["completion"] is not None for row in rows]
    assert report.total == report.succeeded + report.errored == len(lines)
