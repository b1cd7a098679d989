"""What breaks in one item stays in it: neighbours and later items keep every byte."""

from functools import cache

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.caches.positions import PositionCache
from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.drafters.drafter import Draft
from dspark_batch.engine.engine import Engine
from dspark_batch.types import Completion, Failure, Item, Request, Sampling

MARK = 77  # the prompts that are to break begin with this token
GREEDY = Sampling()
STOP_NEVER = Sampling(stop=("never said",))


@cache
def pair():
    return load_case("qwen3_vanilla").pair


def request(index, *, broken=False, sampling=GREEDY, max_tokens=7):
    prompt = load_case("qwen3_vanilla").prompt("greedy0")[index : index + 6]
    item = Item(index, str(index), f"digest-{index}", f"test:{index + 1}")
    return Request(item, (MARK, *prompt) if broken else prompt, max_tokens, sampling)


def answers(used, requests, **settings):
    return {o.item.index: o for o in Engine(used, **settings).generate(requests)}


def ids(outcome):
    return outcome.token_ids if isinstance(outcome, Completion) else None


@cache
def plain(count, **choices):
    """The ids that plain decoding gives, by index."""
    requests = [request(n, **choices) for n in range(count)]
    return {n: ids(o) for n, o in answers(pair(), requests, slots=count, draft_length=0).items()}


class Wrapped:
    """Something of a pair in which one thing is different."""

    def __init__(self, whole):
        self._whole = whole

    def __getattr__(self, name):
        return getattr(self._whole, name)


class SickTarget(Wrapped):
    """Gives NaN, in logits, features and cache, to every slot that began with the mark."""

    sick_from = 0  # cached tokens at which it begins

    def __call__(self, tokens, cache, at=None):
        logits, features = self._whole(tokens, cache, at)
        owner = cache.layers[0]._extent
        begins = ((tokens[:, 0] == MARK) & (owner.lengths == 0))[:, None, None]
        signs = cache.layers[0].keys[:, 0, :1]
        cache.layers[0].keys[:, 0, :1] = mx.where(begins, 12345.0, signs)  # stays in the cache
        sick = (cache.layers[0].keys[:, 0, 0, 0] == 12345.0) & (owner.lengths >= self.sick_from)
        for each in cache.layers:
            each.values = mx.where(sick[:, None, None, None], mx.nan, each.values)
        sick = sick[:, None, None]
        return mx.where(sick, mx.nan, logits), mx.where(sick, mx.nan, features)


@pytest.mark.parametrize("sick_from", [0, 7, 9])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_logits_that_are_no_numbers_fail_their_item_and_no_other(slots, sick_from):
    target = SickTarget(pair().target)
    target.sick_from = sick_from
    requests = [request(n, broken=n in (1, 2)) for n in range(5)]
    seen = answers(pair()._replace(target=target), requests, slots=slots)
    for n in (0, 3, 4):
        assert ids(seen[n]) == plain(5)[n]
    for n in (1, 2):
        assert isinstance(seen[n], Failure)
        assert seen[n].code == "engine"
        assert seen[n].message.startswith(f"test:{n + 1}: the target's logits are not finite")


def test_a_slot_holds_nothing_of_its_former_owner():
    cache = SlotCache([PositionCache], slots=2)
    for length, value in ((9, mx.nan), (3, 1.0)):
        other = SlotCache([PositionCache], slots=1)
        other.reserve(length)
        other.layers[0].update_and_fetch(*[mx.full((1, 1, length, 2), value)] * 2)
        cache.insert([1], other, [0], [length])
    for buffer in (cache.layers[0].keys, cache.layers[0].values):
        assert buffer[1, 0, :, 0].tolist() == [1.0] * 3 + [0.0] * (cache.capacity - 3)


class NanDrafter(Wrapped):
    """Its logits in slot 0 are not numbers; what it takes there is any token."""

    value = mx.nan

    def propose(self, anchor, context, num_drafts, choose):
        def choose_badly(logits, k, among):
            sick = mx.arange(logits.shape[0])[:, None] == 0
            seen.append(mx.where(sick, self.value, logits))
            return choose(seen[-1], k, among)

        seen = []
        draft = self._whole.propose(anchor, context, num_drafts, choose_badly)
        logits = mx.stack(seen, axis=1)
        return Draft(draft.tokens, logits, draft.confidence, logits.max(axis=(1, 2)))


class CrashingDrafter(Wrapped):
    """Raises in one of its two calls, from the third time on."""

    def __init__(self, whole, call, error=ValueError, calm=2):
        super().__init__(whole)
        self.call, self.error, self.calm = call, error, calm

    def _count(self, call):
        if call == self.call:
            self.calm -= 1
            if self.calm < 0:
                raise self.error("shapes do not fit")

    def propose(self, *args):
        self._count("propose")
        return self._whole.propose(*args)

    def extend(self, *args):
        self._count("extend")
        return self._whole.extend(*args)


SAMPLED = Sampling(temperature=1.0, seed=3)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("value", [mx.nan, mx.inf])
@pytest.mark.parametrize("slots", [1, 2])
def test_drafts_that_are_no_numbers_are_not_verified_and_change_no_byte(slots, value, sampling):
    drafter = NanDrafter(pair().drafter)
    drafter.value = value
    requests = [request(n, sampling=sampling) for n in range(3)]
    seen = answers(pair()._replace(drafter=drafter), requests, slots=slots)
    assert {n: ids(o) for n, o in seen.items()} == plain(3, sampling=sampling)
    sick = [o for o in seen.values() if o.fallback]
    assert {o.fallback for o in sick} == {"the drafter's logits are not numbers"}
    assert sum(sum(o.num_drafted) for o in sick) == 0
    assert (len(sick) < len(seen)) == (slots > 1)  # only those in slot 0


def test_under_the_rejection_rule_such_a_draft_leaves_a_sample_of_the_target():
    pair_with = pair()._replace(drafter=NanDrafter(pair().drafter))
    requests = [request(n, sampling=SAMPLED) for n in range(2)]
    calm = answers(pair(), requests, draft_length=0, sampling="rejection")
    seen = answers(pair_with, requests, sampling="rejection")
    assert {n: ids(o) for n, o in seen.items()} == {n: ids(o) for n, o in calm.items()}


@pytest.mark.parametrize(
    ("slots", "call", "calm"),
    [
        *((1, "propose", 0), (2, "propose", 1)),
        *((1, "extend", 0), (2, "extend", 1), (2, "extend", 2), (1, "extend", 4)),
    ],
)
def test_a_drafter_that_crashes_costs_speed_and_no_byte(slots, call, calm):
    drafter = CrashingDrafter(pair().drafter, call, calm=calm)
    requests = [request(n) for n in range(3)]
    seen = answers(pair()._replace(drafter=drafter), requests, slots=slots)
    assert {n: ids(o) for n, o in seen.items()} == plain(3)
    assert seen[2].fallback == "the drafter failed (ValueError: shapes do not fit)"


class LonelyDrafter(Wrapped):
    """Cannot take in a prompt that comes alone."""

    def extend(self, context, features):
        if context.lengths.tolist() == [0]:
            raise ValueError("alone")
        self._whole.extend(context, features)


def test_an_item_without_a_drafter_context_verifies_no_draft_while_its_neighbour_does():
    lengths = (3, 40, 9, 2)  # the last comes after the wave of the others
    requests = [request(n, max_tokens=length) for n, length in enumerate(lengths)]
    used = pair()._replace(drafter=LonelyDrafter(pair().drafter))
    seen = answers(used, requests, slots=2)
    assert sum(seen[1].num_drafted) > 0 == sum(seen[3].num_drafted)
    assert [seen[n].fallback for n in range(4)] == [None, None, None, seen[3].fallback]
    assert "alone" in seen[3].fallback
    assert seen[1].num_drafted[-1] > 0


def test_a_drafter_that_recovers_serves_the_next_item():
    class Once(CrashingDrafter):
        def _count(self, call):
            if call == self.call and self.calm == 0:
                self.calm = -1
                raise self.error("once")

    drafter = Once(pair().drafter, "propose", calm=0)
    seen = answers(pair()._replace(drafter=drafter), [request(0), request(1)])
    assert [seen[n].fallback is None for n in range(2)] == [False, True]
    assert sum(seen[0].num_drafted) == 0 < sum(seen[1].num_drafted)


@pytest.mark.parametrize("use", [{"confidence_threshold": 0.3}, {"log_confidence": True}])
def test_nobody_asks_for_the_confidence_of_a_drafter_that_was_given_up(use):
    drafter = CrashingDrafter(pair().drafter, "extend", calm=3)
    requests = [request(n) for n in range(3)]
    used = pair()._replace(drafter=drafter)
    seen = answers(used, requests, slots=2, **use)
    assert {n: ids(o) for n, o in seen.items()} == plain(3)
    if "log_confidence" in use:
        assert any(() in o.confidence for o in seen.values())
        for o in seen.values():
            assert list(map(len, o.confidence)) == list(o.num_drafted)


class Speechless:
    """A tokenizer that has no text for answers that hold a certain token."""

    def __init__(self, never):
        self.never = never

    def decode(self, token_ids):
        if self.never in token_ids:
            raise OverflowError("no such token")
        return " ".join(map(str, token_ids))


@pytest.mark.parametrize("sampling", [GREEDY, STOP_NEVER])
@pytest.mark.parametrize("at", [0, -1])
def test_an_answer_that_cannot_be_decoded_fails_alone(sampling, at):
    requests = [request(n, sampling=sampling) for n in range(3)]
    never = [token for token in plain(3)[1] if token not in plain(3)[0]][at]
    fine = {n for n in range(3) if never not in plain(3)[n]}
    used = pair()._replace(tokenizer=Speechless(never))
    seen = answers(used, requests, slots=2)
    assert {n for n, o in seen.items() if isinstance(o, Completion)} == fine
    assert {n: ids(seen[n]) for n in fine} == {n: plain(3)[n] for n in fine}
    assert seen[1].message == (
        "test:2: the tokenizer cannot decode the answer (OverflowError: no such token)."
    )
