"""A job of a million lines through an engine that answers at once, and its figures as JSON.

python million_driver.py FOLDER RECORDS
"""

import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import fake_opener

from dspark_batch.run import run
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Failure

BAD_EVERY = 100  # one line in a hundred
BAD = [b"nope", b'{"prompt":NaN}', b'{"prompt":"\xff"}', b"[]", b'{"text":"x"}']


class NullEngine:
    """Answers with the prompt's first tokens; failures pass."""

    def generate(self, stream, may_begin):
        for each in stream:
            if isinstance(each, Failure) or may_begin(each.item):
                yield each if isinstance(each, Failure) else null_answer(each)


def null_answer(request):
    ids = request.prompt_ids[-8:]
    text = "".join(map(chr, ids))
    return Completion(request.item, text, ids, "length", len(request.prompt_ids), (7,), (6,), (6,))


def write_input(path, records):
    with path.open("wb") as file:
        for n in range(records):
            bad = n % BAD_EVERY == BAD_EVERY // 2
            line = BAD[n // BAD_EVERY % len(BAD)] if bad else b'{"prompt":"question %d"}' % n
            file.write(line + b"\n")


def main(folder, records):
    folder, records = Path(folder), int(records)
    write_input(folder / "in.jsonl", records)
    spec = Spec(
        inputs=(str(folder / "in.jsonl"),), out=str(folder / "out.jsonl"), fsync_every=10_000
    )
    began, used = time.monotonic(), time.process_time()
    report = run(spec, open_engine=fake_opener(NullEngine()))
    figures = {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - used, 1),  # others may be using the machine
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rows": report.total,
        "succeeded": report.succeeded,
        "errored": report.errored,
    }
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
