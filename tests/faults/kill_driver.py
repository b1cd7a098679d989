"""The real engine on a recorded pair, in a process that is to be killed.

python kill_driver.py INPUT OUT SLOTS [retry]; stages go to stderr as they begin.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def open_tiny(spec, manifest):
    from golden_cases import load_case

    from dspark_batch.engine.engine import Engine
    from dspark_batch.run import Opened

    pair = load_case("qwen3_vanilla").pair
    engine = Engine(pair, slots=spec.slots)
    return Opened(engine, letters, pair.config.context_length, pair.config.identity)


def letters(messages):
    return [ord(c) for c in messages[-1]["content"]]


def say(tick):
    stage = "row" if tick.outcome else tick.stage
    sys.stderr.write(f"{stage}\n")
    sys.stderr.flush()


def main(given, out, slots, retry=None):
    say_stage("import")
    from dspark_batch.job.spec import Spec
    from dspark_batch.run import run

    spec = Spec(
        inputs=(given,),
        out=out,
        slots=int(slots),
        temperature=1.0,
        max_tokens=8,
        retry_failed=retry is not None,
    )
    return run(spec, open_engine=open_tiny, observe=say).exit_code


def say_stage(name):
    sys.stderr.write(f"{name}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
