"""How the race speaks with the process of an engine: a JSON object a line, a reply for each.

    > {"do": "load", "target": "...", "drafter": "...", "stop_ids": [2]}
    < {"versions": {...}, "blas": "..."}
    > {"do": "go", "setting": {"batch": 32}, "prompts": [[5, 6]], "max_tokens": 128}
    < {"wall_s": 4.2, "processor_s": 4.1, "idle_s": 0.0, "ids": [[7, 2]]}

An engine that cannot do it replies {"error": "..."} and stays. It ends when its input ends.
"""

import json
import subprocess
from contextlib import suppress


class EngineError(Exception):
    """An engine said why it cannot do what it was asked, or its process ended."""


class Engine:
    """The process of an engine, which waits for its turns."""

    def __init__(self, command, environment, log):
        """Start it.

        Args:
            command: the process and its arguments.
            environment: its environment variables, all of them.
            log: an open file for what its libraries print.
        """
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ask(self, do, **what):
        """Ask it to do something, and wait for the reply.

        Raises:
            EngineError: it cannot, or it has ended.
        """
        try:
            print(json.dumps({"do": do, **what}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"its process ended with status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply

    def close(self):
        """End its input, and wait until it has ended."""
        with suppress(BrokenPipeError):  # it has ended before
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(asked, replies, does):
    """Answer until the input ends: the side of the engine.

    Args:
        asked: lines that the race wrote.
        replies: an open file that the race reads.
        does: functions by name; each takes the rest of a message and returns a reply.
    """
    for line in asked:
        message = json.loads(line)
        try:
            reply = does[message.pop("do")](**message)
        except Exception as error:  # noqa: BLE001  the table says what it was
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)
