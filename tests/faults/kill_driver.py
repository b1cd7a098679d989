"""The real engine on a recorded pair, in a process that is to be killed.

python kill_driver.py INPUT OUT SLOTS [retry]; each stage goes to stderr as it begins.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def say(stage):
    sys.stderr.write(f"{stage}\n")
    sys.stderr.flush()


class Telling:
    """A target or a drafter that says what begins with a call of it."""

    proposed = False  # a pass of the target behind a proposal verifies; any other is prefill

    def __init__(self, whole):
        self._whole = whole

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def propose(self, *args):
        Telling.proposed = True
        say("decode")
        return self._whole.propose(*args)

    def __call__(self, *args):
        if not Telling.proposed:
            say("prefill")
        Telling.proposed = False
        return self._whole(*args)


def open_tiny(spec, manifest):
    from golden_cases import load_case

    from dspark_batch.engine.engine import Engine
    from dspark_batch.opening import Opened

    pair = load_case("qwen3_vanilla").pair
    told = pair._replace(target=Telling(pair.target), drafter=Telling(pair.drafter))
    engine = Engine(told, slots=spec.slots, draft_length=4)
    return Opened(engine, letters, pair.config.context_length, pair.config.identity)


def letters(messages):
    return [ord(c) for c in messages[-1]["content"]]


def say_tick(tick):
    say("row" if tick.outcome else {"decode": "admit"}.get(tick.stage, tick.stage))


def tell_of_the_journal():
    from dspark_batch.record.journal import Journal

    append = Journal.append

    def telling(*args):
        say("journal")
        return append(*args)

    Journal.append = telling


def main(given, out, slots, retry=None):
    say("import")
    from dspark_batch.run import run
    from dspark_batch.spec.spec import Spec

    tell_of_the_journal()
    spec = Spec(
        inputs=(given,),
        out=out,
        slots=int(slots),
        temperature=1.0,
        max_tokens=8,
        retry_failed=retry is not None,
    )
    return run(spec, open_engine=open_tiny, observe=say_tick).exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
