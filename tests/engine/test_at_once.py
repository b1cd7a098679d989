"""On a CPU products begin while the rest of their pass is said."""

from threading import Thread

import mlx.core as mx
import pytest

from dspark_batch import device
from dspark_batch.engine.passes import Passes
from dspark_batch.numerics.rows import are_as_they_come, as_they_come
from dspark_batch.pair import load_pair

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="a GPU gets whole passes")


@pytest.fixture(scope="module")
def tiny():
    return load_pair("tiny")


@pytest.fixture
def begun(monkeypatch):
    """Count the arrays that begin."""
    arrays = []
    real = mx.async_eval
    monkeypatch.setattr(device.mx, "async_eval", lambda *a: (arrays.extend(a), real(*a)))
    return arrays


def test_the_products_of_a_pass_begin_one_by_one(tiny, begun):
    passes = Passes(tiny.target, tiny.drafter)
    cache = passes.make_cache(2, 64)
    passes.run(cache, mx.array([[1, 2], [3, 4]]))
    assert len(begun) > 2 * tiny.target.facts.num_layers


def test_nothing_begins_outside_of_passes(tiny, begun):
    cache = tiny.target.make_cache(1, 64)
    logits, _ = tiny.target(mx.array([[1, 2]]), cache)
    assert not begun
    assert device.begun(logits) is logits
    assert not begun


def test_what_is_differentiated_begins_nothing():
    gradient = mx.grad(lambda x: device.begun(x * x).sum())
    assert gradient(mx.array([3.0])).item() == 6.0


def test_how_products_run_is_a_matter_of_one_thread():
    seen = []

    def other():
        seen.append(are_as_they_come())
        seen.append(bool(device._begins.get()))

    with as_they_come(), device.computing_at_once():
        thread = Thread(target=other)
        thread.start()
        thread.join()
        assert are_as_they_come()
    assert seen == [False, False]
    assert not are_as_they_come()
