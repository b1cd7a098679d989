"""From a pair, and what the user fixed, to how a job begins: by rules."""

import gc
import json
from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine import setup as planning
from dspark_batch.engine.conformance import Conformance
from dspark_batch.engine.setup import set_up
from dspark_batch.engine.shapes import FALLBACK, Shapes
from dspark_batch.errors import UsageError
from dspark_batch.tuning import kept

ANY, ONE = (Conformance(shapes, "bits", 0.5) for shapes in (Shapes(), Shapes(fixed=FALLBACK)))


@pytest.fixture(autouse=True)
def cpu(tmp_path, monkeypatch):
    """A CPU that nothing is known about, and a target that conforms."""
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(planning, "_IS_CPU", True)
    monkeypatch.setattr(planning, "_ROUND_TOKENS", 512)
    monkeypatch.setattr(planning, "_GOOD_TOKENS", 256)
    monkeypatch.setattr(planning, "_MOST_SLOTS", 64)
    monkeypatch.setattr(planning, "conformance", lambda target: ANY)


@pytest.fixture
def pair():
    return load_case("qwen3_vanilla").pair  # its drafter's block has 7 positions


@pytest.fixture
def little_memory(monkeypatch):
    """Room for four slots of a prompt and an answer of the usual sizes."""
    monkeypatch.setattr(planning, "_CACHE_SHARE", 1.0)
    monkeypatch.setattr(planning, "_cached_bytes", lambda pair: (1, 0))
    monkeypatch.setattr(planning, "_free_bytes", lambda: 4 * 100 + 99)


@pytest.mark.parametrize(
    ("asked", "slots", "draft_length", "why"),
    [
        ({}, 64, 7, "slots by tokens that are worth a pass; rounds choose how many drafts"),
        ({"draft_length": 1}, 64, 1, "slots by tokens that are worth a pass; drafts as asked"),
        ({"draft_length": 0}, 64, 0, "slots by tokens that are worth a pass; drafts as asked"),
        ({"slots": 5}, 5, 7, "slots as asked; rounds choose how many drafts"),
        ({"slots": 5, "draft_length": 2}, 5, 2, "slots as asked; drafts as asked"),
        ({"num_items": 9}, 9, 7, "slots by items; rounds choose how many drafts"),
        ({"num_items": 9, "slots": 12}, 12, 7, "slots as asked; rounds choose how many drafts"),
        ({"num_items": 1}, 1, 7, "slots by items; rounds choose how many drafts"),
        ({"num_items": 28}, 28, 7, "slots by items; rounds choose how many drafts"),
        ({"num_items": 64}, 32, 7, "slots by items; rounds choose how many drafts"),
        ({"num_items": 95}, 32, 7, "slots by items; rounds choose how many drafts"),
        (
            {"num_items": 96},
            64,
            7,
            "slots by tokens that are worth a pass; rounds choose how many drafts",
        ),
        (
            {"num_items": 64, "draft_length": 0},
            64,
            0,
            "slots by tokens that are worth a pass; drafts as asked",
        ),
    ],
)
def test_a_plan_follows_rules_and_what_was_asked(pair, asked, slots, draft_length, why):
    plan = set_up(pair, **asked).plan
    assert (plan.slots, plan.draft_length, plan.why) == (slots, draft_length, why)


@pytest.mark.parametrize("num_items", [None, 0])
def test_without_a_number_of_items_there_is_no_limit_by_items(pair, num_items):
    assert set_up(pair, num_items=num_items).plan.slots == 64


def test_a_pair_without_a_drafter_drafts_nothing(pair):
    found = set_up(pair._replace(drafter=NoDrafter()))
    assert (found.plan.slots, found.plan.draft_length, found.lengths) == (64, 0, (0,))
    assert found.plan.why == "slots by tokens that are worth a pass; no drafter"


@pytest.mark.usefixtures("little_memory")
def test_slots_fit_into_the_memory(pair, monkeypatch):
    monkeypatch.setattr(planning, "_USUAL_PROMPT", 60)
    found = set_up(pair, max_tokens=40)
    assert (found.plan.slots, found.most_positions) == (4, 499)
    assert found.plan.why.startswith("slots by memory; ")
    assert set_up(pair, max_tokens=40, slots=4).plan.slots == 4
    with pytest.raises(UsageError, match="--slots 5 do not fit into the memory here: 1 to 4 do"):
        set_up(pair, max_tokens=40, slots=5)
    assert set_up(pair, max_tokens=4000).plan.slots == 1  # one always goes, alone


def test_all_that_is_impossible_is_told_at_once(pair, little_memory, monkeypatch):
    monkeypatch.setattr(planning, "_USUAL_PROMPT", 60)
    with pytest.raises(UsageError) as caught:
        set_up(pair, max_tokens=40, slots=5, draft_length=8)
    assert str(caught.value) == (
        "--slots 5 do not fit into the memory here: 1 to 4 do; --draft-length 8 is too long: "
        "0 to 7 work. Take one of these, or leave it out."
    )


def test_every_number_of_slots_and_drafts_is_served(pair):
    pairs = [*((6, length) for length in range(8)), *((slots, 7) for slots in (1, 33, 64))]
    for slots, draft_length in pairs:
        plan = set_up(pair, slots=slots, draft_length=draft_length).plan
        assert (plan.slots, plan.draft_length) == (slots, draft_length)


def test_a_target_of_one_shape_has_slots_and_drafts_within_it(pair, monkeypatch):
    monkeypatch.setattr(planning, "conformance", lambda target: ONE)
    most_slots, width = FALLBACK
    found = set_up(pair)
    assert (found.plan.slots, found.plan.draft_length) == (most_slots, width - 1)
    with pytest.raises(UsageError, match=f"1 to {most_slots} do"):
        set_up(pair, slots=most_slots + 1)
    assert json.loads(json.dumps(found.to_json()))["step_shape"] == list(FALLBACK)


def test_rounds_may_choose_any_draft_length_on_a_cpu_and_few_on_a_gpu(pair, monkeypatch):
    assert set_up(pair).lengths == tuple(range(8))
    monkeypatch.setattr(planning, "_IS_CPU", False)
    assert planning._lengths(7) == (0, 1, 3, 7)
    assert planning._lengths(0) == (0,)


class Learnt(NamedTuple):
    """Costs that a job learnt."""

    is_worth_keeping: bool

    def weights(self):
        return 1.0, 2.0, 3.0, 4.0


def test_costs_begin_with_the_rule_and_then_with_what_a_job_learnt(pair):
    before = set_up(pair)
    target, by_token, drafter, by_draft = before.costs
    assert target == 1
    assert 0 < by_token < 1
    assert 0 < by_draft < drafter < 10
    before.keep_learnt(Learnt(is_worth_keeping=False))
    assert set_up(pair).costs == before.costs
    before.keep_learnt(Learnt(is_worth_keeping=True))
    after = set_up(pair)
    assert after.costs == (1.0, 2.0, 3.0, 4.0)
    assert after.plan == before.plan  # what was learnt is a hint for rounds
    other = set_up(pair._replace(drafter=NoDrafter()))
    assert len(other.costs) == 4


def test_the_manifest_is_told_what_decides(pair):
    said = json.loads(json.dumps(set_up(pair).to_json()))
    assert said.keys() == {
        *("plan", "step_shape", "divergence", "dtype", "most_positions"),
        *("machine", "blas_threads"),
    }
    assert said["step_shape"] is None
    assert said["divergence"] == 0.5
    assert said["dtype"] == "float32"
    assert said["machine"] == kept.machine()


def test_what_a_position_takes_is_what_caches_hold(pair):
    layers = len(pair.target.make_cache(1, 1).layers) + pair.drafter.num_layers
    found, per_slot = planning._cached_bytes(pair)
    assert per_slot == 0
    cache = pair.target.make_cache(1, 1)
    pair.target(mx.array([[0]]), cache)
    one = sum(array.nbytes // array.shape[2] for array in cache.arrays()[1:])
    assert one < found < layers * one


def test_a_drafter_that_fails_is_no_hindrance(pair):
    def fails(context, features):
        raise RuntimeError("no")

    broken = SimpleNamespace(
        block_size=7,
        num_layers=2,
        make_cache=pair.drafter.make_cache,
        extend=fails,
        parameters=pair.drafter.parameters,
    )
    assert set_up(pair._replace(drafter=broken)).plan.draft_length == 7


def active_bytes(make):
    """What MLX has in memory after a call more than before, and what the call returned."""
    most = mx.set_cache_limit(0)  # or small arrays would get larger buffers that are there
    gc.collect()  # or what an earlier test left in a cycle might go meanwhile
    mx.synchronize()
    before = mx.get_active_memory()
    made = make()
    mx.synchronize()  # until then a CPU holds what its last steps read
    mx.set_cache_limit(most)
    return mx.get_active_memory() - before, made


@pytest.mark.parametrize("case", ["qwen3_vanilla", "qwen35_dflash"])
def test_a_slot_takes_the_bytes_that_are_claimed(case):
    """`check` and the plan tell them by shapes alone; MLX has the truth."""
    pair, slots = load_case(case).pair, 3

    def filled(model, step, positions=100):
        cache = model.make_cache(slots, positions)
        step(cache)
        cache.keep(mx.ones(slots, dtype=mx.int32))
        mx.eval(cache.arrays())
        return cache

    tokens = mx.zeros((slots, 1), mx.int32)
    _, features = pair.target.by_itself(tokens)
    mx.eval(features, pair.target.model.parameters())
    filled(pair.target, lambda cache: pair.target(tokens, cache))  # what stays is there
    filled(pair.drafter, lambda cache: pair.drafter.extend(cache, features))
    of_target, cache = active_bytes(lambda: filled(pair.target, lambda c: pair.target(tokens, c)))
    # A larger one: now and then some hundred bytes of other arrays go meanwhile.
    of_drafter, context = active_bytes(
        lambda: filled(pair.drafter, lambda c: pair.drafter.extend(c, features), 2000)
    )
    position, slot = pair.target.cached_bytes()
    assert slots * (position * cache.capacity + slot) == pytest.approx(of_target, rel=0.001)
    planned, state = planning._cached_bytes(pair)
    drafter = (planned - position) * context.capacity * slots
    assert drafter == pytest.approx(of_drafter, rel=0.001)
    assert state == slot
    assert (slot > 0) == (case == "qwen35_dflash")
