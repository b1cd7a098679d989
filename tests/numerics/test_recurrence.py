"""Recurrences against their definition, and in pieces: the width of a step changes no bit."""

import mlx.core as mx
import numpy as np
import pytest

from dspark_batch.numerics.recurrence import gated_delta, state_space

SLOTS, WIDTH, KEY_HEADS, HEADS, SIZE, ROWS = 3, 9, 2, 4, 16, 8


def normal(seed, *shape):
    return mx.random.normal(shape, key=mx.random.key(seed))


def delta_inputs():
    keys = normal(1, SLOTS, WIDTH, KEY_HEADS, SIZE)
    keys = keys / mx.linalg.norm(keys, axis=-1, keepdims=True)
    return [
        normal(0, SLOTS, WIDTH, KEY_HEADS, SIZE),
        keys,
        normal(2, SLOTS, WIDTH, HEADS, ROWS),
        mx.sigmoid(normal(3, SLOTS, WIDTH, HEADS)),
        mx.sigmoid(normal(4, SLOTS, WIDTH, HEADS)),
    ]


def space_inputs():
    return [
        normal(5, SLOTS, WIDTH, KEY_HEADS, SIZE),
        normal(6, SLOTS, WIDTH, KEY_HEADS, SIZE),
        normal(7, SLOTS, WIDTH, HEADS, ROWS),
        mx.sigmoid(normal(8, SLOTS, WIDTH, HEADS)),
    ]


def delta_by_definition(inputs, state):
    """Decay, read, write, read again; in 64 bits, head by head."""
    q, k, v, decay, strength = (np.array(a, dtype=np.float64) for a in inputs)
    state, outputs = np.array(state, dtype=np.float64), np.zeros(v.shape)
    for slot, token, head in np.ndindex(SLOTS, WIDTH, HEADS):
        at = (slot, token, head // (HEADS // KEY_HEADS))
        own = state[slot, head] * decay[slot, token, head]
        delta = strength[slot, token, head] * (v[slot, token, head] - own @ k[at])
        state[slot, head] = own + np.outer(delta, k[at])
        outputs[slot, token, head] = state[slot, head] @ q[at]
    return outputs, state


def space_by_definition(inputs, state):
    readers, writers, written, decay = (np.array(a, dtype=np.float64) for a in inputs)
    state, outputs = np.array(state, dtype=np.float64), np.zeros(written.shape)
    for slot, token, head in np.ndindex(SLOTS, WIDTH, HEADS):
        at = (slot, token, head // (HEADS // KEY_HEADS))
        own = state[slot, head] * decay[slot, token, head]
        state[slot, head] = own + np.outer(written[slot, token, head], writers[at])
        outputs[slot, token, head] = state[slot, head] @ readers[at]
    return outputs, state


KINDS = {
    "gated delta": (gated_delta, delta_inputs, delta_by_definition),
    "state space": (state_space, space_inputs, space_by_definition),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def first_state():
    return normal(9, SLOTS, HEADS, ROWS, SIZE)


@every_kind
@pytest.mark.parametrize("begins", ["at zero", "somewhere"])
def test_it_does_what_its_definition_says(kind, begins):
    run, make, define = KINDS[kind]
    state = first_state() if begins == "somewhere" else None
    found = run(make(), state, None)
    expected = define(make(), mx.zeros_like(first_state()) if state is None else state)
    for ours, known in zip(found, expected, strict=True):
        assert np.abs(np.array(ours) - known).max() < 1e-5


@every_kind
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_two_steps_are_one(kind, cut):
    run, make, _ = KINDS[kind]
    outputs, state = run(make(), first_state(), None)
    first, middle = run([a[:, :cut] for a in make()], first_state(), None)
    second, last = run([a[:, cut:] for a in make()], middle, None)
    assert mx.array_equal(mx.concatenate([first, second], axis=1), outputs)
    assert mx.array_equal(last, state)


@every_kind
def test_masked_tokens_change_no_state_and_the_others_no_bit(kind):
    run, make, _ = KINDS[kind]
    counts = [0, 4, 9]
    mask = mx.arange(WIDTH) < mx.array(counts)[:, None]
    sick = [mx.where(mask.reshape(*mask.shape, *[1] * (a.ndim - 2)), a, mx.nan) for a in make()]
    _, state = run(sick, first_state(), mask)
    for slot, count in enumerate(counts):
        if count == 0:
            assert mx.array_equal(state[slot], first_state()[slot])
            continue
        own = [a[slot : slot + 1, :count] for a in make()]
        _, alone = run(own, first_state()[slot : slot + 1], None)
        assert mx.array_equal(state[slot], alone[0])
