"""A prompt of a long context runs in memory that grows as its cache does."""

import checkpoints as make
import mlx.core as mx
import pytest

from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.passes import Passes
from dspark_batch.engine.prefill import prefill_alone
from dspark_batch.engine.shapes import Shapes
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.models.target import Target
from dspark_batch.numerics import attention

HEADS, CONTEXT = 4, 32768


@pytest.fixture
def passes():
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    model = make.model_of(make.qwen3(2, max_position_embeddings=CONTEXT, **sizes))
    mx.eval(model.parameters())
    make_rows_safe(model)
    return Passes(Target(model), NoDrafter())


def prompt_bytes(passes, tokens):
    """The peak of the memory while a prompt runs, and what its cache takes of it."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    filled = prefill_alone(passes, Shapes(), [n % make.VOCAB for n in range(tokens)])
    mx.eval(filled.logits)
    cached = filled.cache.bytes_per_position * filled.cache.capacity
    return mx.get_peak_memory() - before, cached


def test_the_memory_of_a_prompt_grows_as_its_cache_does(passes, monkeypatch):
    monkeypatch.setattr(attention, "_MOST_SCORES", 1 << 16)
    (short, cached), (long, more_cached) = (prompt_bytes(passes, n) for n in (512, 2048))
    assert more_cached == 4 * cached
    # The cache, a copy of it while it is written, and the mask of a pass.
    assert long - short < 3 * (more_cached - cached)


def test_a_prompt_without_that_bound_takes_more(passes, monkeypatch):
    monkeypatch.setattr(attention, "_MOST_SCORES", 1 << 40)
    (short, cached), (long, more_cached) = (prompt_bytes(passes, n) for n in (512, 2048))
    assert long - short > 3 * (more_cached - cached)
