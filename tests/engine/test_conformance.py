"""A target is checked at load, and one whose bits depend on the shape of a pass has one shape."""

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.engine import conformance as conforming
from dspark_batch.engine.conformance import conformance
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.engine.shapes import FALLBACK, Shapes
from dspark_batch.errors import ModelError
from dspark_batch.models import attention
from dspark_batch.models.target import Target
from dspark_batch.types import Item, Request, Sampling


class ShapeDependent:
    """A target with an operation whose bits depend on the shape of a pass."""

    def __init__(self, target, noise):
        self._target, self._noise = target, noise

    def __getattr__(self, name):
        return getattr(self._target, name)

    def __call__(self, tokens, cache, at=None):
        logits, features = self._target(tokens, cache, at)
        return logits + self._noise(*tokens.shape), features


def by_shape(slots, width):
    return 1e-3 * mx.sin(mx.arange(192) * slots + 7 * width)


def much_by_shape(slots, width):
    return 500 * by_shape(slots, width)


def by_slots(slots, width):
    return 1e-3 * slots


def by_width(slots, width):
    return 1e-3 * width


class Loose:
    """Noise that no shape explains."""

    def __init__(self):
        self.passes = 0

    def __call__(self, slots, width):
        self.passes += 1
        return 1e-3 * self.passes


def with_noise(noise):
    pair = load_case("qwen3_vanilla").pair
    return pair._replace(target=ShapeDependent(pair.target, noise))


@pytest.mark.parametrize("name", ["qwen3_vanilla", "gemma4_vanilla"])
def test_a_target_of_safe_products_may_run_in_any_shape(name):
    found = conformance(load_case(name).pair.target)
    assert found.shapes == Shapes()
    assert 0 <= found.divergence < 1e-3
    assert len(found.numerics) == 32
    assert found == conformance(load_case(name).pair.target)


def test_numerics_name_the_bits():
    same, other = (load_case(name).pair.target for name in ("qwen3_vanilla", "gemma4_vanilla"))
    assert conformance(same).numerics != conformance(other).numerics
    nearly = ShapeDependent(same, lambda slots, width: 1e-6)
    assert conformance(nearly).numerics != conformance(same).numerics


@pytest.mark.parametrize("noise", [by_shape, by_slots, by_width])
def test_a_target_whose_bits_depend_on_the_shape_runs_in_one(noise):
    found = conformance(with_noise(noise).target)
    assert found.shapes == Shapes(fixed=FALLBACK)
    assert found.divergence > 1e-4


def test_a_target_that_does_not_call_its_head_runs_in_one(monkeypatch):
    """Its own code multiplies by the head's weight, and few tokens may not show it."""
    target = load_case("qwen3_vanilla").pair.target
    monkeypatch.setattr(type(target), "multiplies_by_its_head", False)
    assert conformance(target).shapes == Shapes(fixed=FALLBACK)


def test_a_target_that_never_repeats_itself_is_refused():
    with pytest.raises(ModelError, match="other bits beside others than alone"):
        conformance(with_noise(Loose()).target)


def in_many_rows(slots, width):
    return 1e-3 * (width == 1 and slots > 3)


def failing_in_many_rows(slots, width):
    if in_many_rows(slots, width):
        raise ValueError("it knows no such step")
    return 0.0


@pytest.mark.parametrize("noise", [in_many_rows, failing_in_many_rows])
def test_a_target_whose_packed_passes_are_others_has_none(noise):
    found = conformance(with_noise(noise).target)
    assert found.shapes == Shapes(packed=False)
    plain = conformance(load_case("qwen3_vanilla").pair.target)
    assert plain == found._replace(shapes=Shapes(packed=True))


def test_a_target_with_states_has_no_packed_passes():
    assert conformance(load_case("qwen35_dflash").pair.target).shapes == Shapes(packed=False)


def test_products_that_run_as_they_come_are_seen(monkeypatch):
    """Planted: the kernel of a product depends on the number of its rows."""
    pair = load_case("qwen3_vanilla").pair
    layer = pair.target.model.model.layers[0].mlp.gate_proj

    class Loose(type(layer)):
        def __call__(self, hidden):
            return super().__call__(hidden) * (1 + 1e-6 * hidden.shape[0] * hidden.shape[1])

    monkeypatch.setattr(layer, "__class__", Loose)
    assert conformance(pair.target).shapes == Shapes(fixed=FALLBACK)


def test_attention_that_depends_on_the_width_is_seen(monkeypatch):
    plain = attention.ragged_attention

    def by_width(queries, keys, values, scale, *others, **more):
        scale = scale * (1 + 1e-3 * queries.shape[2])
        return plain(queries, keys, values, scale, *others, **more)

    monkeypatch.setattr(attention, "ragged_attention", by_width)
    assert conformance(load_case("qwen3_vanilla").pair.target).shapes == Shapes(fixed=FALLBACK)


def requests():
    case = load_case("qwen3_vanilla")
    ids = case["greedy0.output_ids"].tolist()
    found = []
    for index in range(4):
        sampling = Sampling(temperature=0.8 * (index % 2), seed=5)
        item = Item(index, str(index), f"digest-{index}", f"test:{index}")
        found.append(Request(item, tuple(ids[: 3 + 8 * index]), 6 + 3 * index, sampling))
    return found


def answers(pair, **settings):
    engine = Engine(pair, **settings)
    return {a.item.index: (a.token_ids, a.finish_reason) for a in engine.generate(requests())}


def test_a_target_far_from_mlx_lms_own_pass_is_refused():
    with pytest.raises(ModelError, match=r"lie 0\.\d+ of their spread .* would be decoded wrongly"):
        conformance(with_noise(much_by_shape).target)


def test_in_one_shape_its_answers_are_equal_at_all_numbers_of_slots_and_drafts(monkeypatch):
    monkeypatch.setattr(conforming, "_MOST_DISTANCE", {mx.float32: 1.0})  # or no token would change
    pair = with_noise(much_by_shape)
    setup = set_up(pair, max_tokens=20)
    assert setup.shapes.fixed == FALLBACK
    one = {"shapes": setup.shapes}
    alone = answers(pair, slots=1, draft_length=0, prefix_positions=0, **one)
    assert answers(pair, slots=1, **one) == alone
    assert answers(pair, slots=3, draft_length=4, **one) == alone
    assert answers(pair, slots=16, lengths=setup.lengths, costs=setup.costs, **one) == alone
    free = [answers(pair, slots=slots, draft_length=0) for slots in (1, 3)]
    assert free[0] != free[1]  # it is not for nothing


def test_any_object_with_what_a_target_has_is_checked():
    assert not isinstance(with_noise(by_shape).target, Target)
