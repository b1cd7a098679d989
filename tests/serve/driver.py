"""A server process with the fake engine, to be killed.

python driver.py '{"data_dir": "/tmp/x", "pause_s": 0.01, "kill_at": "finalizing"}'
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import FakeSteps, fake_steps_opener

from dspark_batch.cli.main import main as command_line
from dspark_batch.serve import batches, server


def main(data_dir, pause_s=0.0, dies_on=None, kill_at=None, kill_in=None):
    """Serve, and die when a batch reaches a status, or in the middle of writing its files."""
    note, publish = batches.Batches._note, batches.Batches._publish
    validated = batches.Batches._validated

    def noted(self, batch_id, status, **changes):
        told = note(self, batch_id, status, **changes)
        if told["status"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return told

    def validate(self, batch_id):
        if kill_at == "validating":
            os.kill(os.getpid(), signal.SIGKILL)
        return validated(self, batch_id)

    def published(self, batch_id, status, lines):
        def few():
            yield next(lines)
            os.kill(os.getpid(), signal.SIGKILL)

        publish(self, batch_id, status, few() if kill_in == status else lines)

    batches.Batches._note, batches.Batches._publish = noted, published
    batches.Batches._validated = validate
    server._LAST_WORDS_S = 3.0  # on a busy machine clients need time to ask
    opener = fake_steps_opener(FakeSteps(slots=2, pause_s=pause_s, dies_on=dies_on))
    server.open_pair = lambda spec, manifest: opener()
    words = ["serve", "--port", "0", "--data-dir", data_dir, "--grace", "1"]
    return command_line(words)


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))
