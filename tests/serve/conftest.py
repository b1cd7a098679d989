import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # serving

from serving import served


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with a fake engine, for tests that leave it as it was."""
    with served(tmp_path_factory.mktemp("data")) as one:
        yield one
