"""A process of its own that runs a job with the fake engine, to be killed or starved.

python driver.py '{"spec": {...}, "pause_s": 0.01, "largest_file": 4096}'
"""

import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import FakeEngine, fake_opener

from dspark_batch.errors import DsparkBatchError
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec, number_or_none


def main(spec, pause_s=0.0, largest_file=None):
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    spec = Spec(**spec | {"inputs": tuple(spec["inputs"])})
    try:
        engine = FakeEngine(number_or_none(spec.slots) or 1, pause_s)
        return run(spec, open_engine=fake_opener(engine)).exit_code
    except DsparkBatchError as error:
        sys.stderr.write(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))
