"""The probe finds which passes are alike, on targets whose likeness is known."""

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.engine.probe import Limits, default_limits, numerics, probe

LIMITS = Limits(
    slots=(1, 2, 4, 8), widths=(1, 2, 4, 8), prompts=(1, 2), lengths=(8, 16), capacities=(64, 128)
)


class Odd:
    """A target that gives other bits in some passes; `where` says which, by slots and width."""

    def __init__(self, where, in_cache=False):
        self._whole = load_case("qwen3_vanilla").pair.target
        self._where, self._in_cache = where, in_cache

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def __call__(self, tokens, caches):
        logits, features = self._whole(tokens, caches)
        if not self._where(*tokens.shape, caches[0]):
            return logits, features
        if not self._in_cache:
            return logits + 1e-3 * mx.arange(logits.shape[-1]), features
        caches[-1].keys = caches[-1].keys * 1.0001
        return logits, features


class Slow:
    """A target whose passes take time on a clock of their own, and no other time is."""

    def __init__(self, pass_s, token_s):
        self._whole = load_case("qwen3_vanilla").pair.target
        self._pass_s, self._token_s = pass_s, token_s
        self.seconds = 0.0

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def __call__(self, tokens, caches):
        self.seconds += self._pass_s + self._token_s * tokens.size
        return self._whole(tokens, caches)


class Stopped(Slow):
    """Was stopped for a while, in the second pass of a whole block."""

    blocks = 0

    def __call__(self, tokens, caches):
        self.blocks += tokens.shape == (1, 8)
        self.seconds += 90.0 * (self.blocks == 2 and tokens.shape == (1, 8))
        return super().__call__(tokens, caches)


def is_small(slots, width, cache):
    return slots * width < 8


def test_passes_that_give_other_logits_are_not_of_the_class():
    machine = probe(Odd(is_small), LIMITS)
    steps = set(machine.shapes.steps)
    assert steps <= {(s, w) for s in LIMITS.slots for w in LIMITS.widths if s * w >= 8}
    assert any(width == 8 for _, width in steps)
    assert machine.divergence > 1e-3


def test_passes_that_cache_other_keys_are_not_of_the_class_although_their_logits_are_right():
    machine = probe(Odd(lambda s, w, c: (s, w) == (2, 8), in_cache=True), LIMITS)
    assert (2, 8) not in machine.shapes.steps


def test_prefill_has_a_class_of_its_own():
    machine = probe(Odd(lambda s, w, c: w == 16), LIMITS)
    widths = {width for _, width in machine.shapes.prefill}
    assert widths in ({8}, {16})


def test_buffers_that_are_too_short_are_left_out():
    def is_short(slots, width, cache):
        return cache._extent.capacity < 128 and slots * width >= 8

    assert probe(Odd(is_short), LIMITS).shapes.least_capacity == 128


def test_a_class_can_verify_a_whole_block():
    machine = probe(Odd(lambda s, w, c: w == 8), LIMITS)
    assert {width for _, width in machine.shapes.steps} == {8}


@pytest.mark.parametrize("broken", [False, True])
def test_its_bits_have_a_name_that_changes_with_them(broken):
    target = load_case("qwen3_vanilla").pair.target
    machine = probe(target, LIMITS)
    other = Odd(lambda s, w, c: broken)
    assert (numerics(other, machine.shapes) == machine.numerics) is not broken


def test_every_pass_of_the_class_has_a_time():
    machine = probe(load_case("gemma4_vanilla").pair.target, LIMITS)
    assert {(p.slots, p.width) for p in machine.target} == set(machine.shapes.steps)
    assert all(p.seconds > 0 for p in machine.target + machine.others)


@pytest.mark.parametrize(
    ("pass_s", "token_s"), [(0.02, 0.01), (0.1, 0.03), (0.35, 0.0), (2.5, 0.0)]
)
def test_on_a_slow_machine_it_ends_in_a_minute_with_a_class_that_can_be_used(pass_s, token_s):
    target, limits = Slow(pass_s, token_s), default_limits()
    machine = probe(target, limits, lambda: target.seconds)
    assert target.seconds < 60
    assert any(width == 8 for _, width in machine.shapes.steps)
    assert machine.shapes.prefill
    for each in machine.target:
        assert each.seconds == pytest.approx(pass_s + token_s * each.slots * each.width)


def test_on_a_fast_machine_all_is_measured():
    target = Slow(0.001, 0.0)
    machine = probe(target, LIMITS, lambda: target.seconds)
    tried = {(s, w) for s in LIMITS.slots for w in LIMITS.widths}
    assert {(p.slots, p.width) for p in machine.target + machine.others} == tried


def test_a_pass_during_which_the_program_was_stopped_ends_nothing():
    target = Stopped(0.001, 0.0)
    machine = probe(target, LIMITS, lambda: target.seconds)
    assert target.seconds > 90
    blocks = {(slots, 8) for slots in LIMITS.slots}
    assert blocks <= {(p.slots, p.width) for p in machine.target + machine.others}
    assert all(each.seconds == pytest.approx(0.001) for each in machine.target)
