"""Small buffers: less work for a slow BLAS, and buffers that grow in the middle of an answer."""

import pytest

from dspark_batch.engine import cache


@pytest.fixture(autouse=True, scope="module")
def small_buffers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_STEP", 32)
        yield
