"""Small blocks: less work for a slow BLAS, and buffers that grow in the middle of an answer."""

import pytest

from dspark_batch.caches import slot_cache
from dspark_batch.engine import shapes
from dspark_batch.numerics import attention


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", 32)
        patch.setattr(slot_cache, "BLOCK", 32)
        patch.setattr(shapes, "BLOCK", 32)
        yield
