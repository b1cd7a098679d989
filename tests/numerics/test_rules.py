"""Both rules draw exactly from the target, whatever is drafted; and the tests would notice.

The target is a Markov chain over a tiny vocabulary, so whole answers have known probabilities.
Thousands of slots run the engine's round at once, each with its own noise.
"""

import mlx.core as mx
import numpy as np
import pytest
from chi_square import chi_square_excess

from dspark_batch.numerics.chance import Chance
from dspark_batch.numerics.confidence import threshold_lengths
from dspark_batch.numerics.rules import Coupled, Greedy, Rejection
from dspark_batch.numerics.sampling import Filters, Settings

VOCAB, SLOTS, LENGTH = 4, 60_000, 3
RULES = {"coupled": Coupled, "rejection": Rejection}


def chain(seed):
    """Logits [V, V]: a row for each token before."""
    return 1.5 * mx.random.normal((VOCAB, VOCAB), key=mx.random.key(seed))


TARGET, DRAFTER = chain(1), chain(2)


def keys(slots=SLOTS, seed=0):
    return mx.stack([mx.full(slots, seed), mx.arange(slots)], axis=-1).astype(mx.uint32)


def settings(temperature=1.0, filters=None, slots=SLOTS):
    return Settings(mx.full(slots, temperature), filters)


def decode(rule, settings, drafter=DRAFTER, num_drafts=2, verify_len=None):
    """Run rounds as the engine does until every slot has LENGTH tokens; [SLOTS, LENGTH]."""
    slots = settings.temperature.shape[0]
    verify_len = mx.full(slots, num_drafts) if verify_len is None else verify_len
    lengths, answers = np.zeros(slots, np.int32), np.zeros((slots, LENGTH), np.int32)
    begin = rule(settings, Chance(keys(slots), mx.array(lengths)))
    anchor = begin.first(mx.broadcast_to(TARGET[0], (slots, VOCAB)))
    commit(answers, lengths, np.array(anchor)[:, None], np.ones(slots, np.int32))
    while lengths.min() < LENGTH:
        this = rule(settings, Chance(keys(slots), mx.array(lengths)))
        tokens = [anchor]
        for k in range(num_drafts):
            tokens.append(this.draft(drafter[tokens[-1]], k).astype(mx.int32))
        accepted, anchor = this.verify(
            mx.stack(tokens[1:], axis=1), verify_len, TARGET[mx.stack(tokens, axis=1)]
        )
        block = np.stack([*tokens[1:], np.zeros_like(anchor)], axis=1)
        np.put_along_axis(block, np.array(accepted)[:, None], np.array(anchor)[:, None], axis=1)
        commit(answers, lengths, block, np.array(accepted) + 1)
    return answers


def commit(answers, lengths, block, counts):
    for column in range(block.shape[1]):
        position = lengths + column
        slots = np.flatnonzero((column < counts) & (position < LENGTH))
        answers[slots, position[slots]] = block[slots, column]
    lengths += counts


def expected_counts(temperature=1.0, slots=SLOTS):
    """How often each answer must come: the target's own probabilities, multiplied out."""
    p = np.array(mx.softmax(TARGET / temperature, axis=-1), np.float64)
    return slots * np.einsum("a,ab,bc->abc", p[0], p, p)


def counts(answers):
    cells = np.ravel_multi_index(tuple(answers.T), (VOCAB,) * LENGTH)
    return np.bincount(cells, minlength=VOCAB**LENGTH)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_answers_have_the_targets_own_distribution(rule, temperature, num_drafts):
    answers = decode(rule, settings(temperature), num_drafts=num_drafts)
    assert chi_square_excess(counts(answers), expected_counts(temperature)) < 0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_slots_that_verify_different_lengths_have_it_too(rule):
    verify_len = mx.arange(SLOTS) % 4
    answers = decode(rule, settings(), num_drafts=3, verify_len=verify_len)
    for length in range(4):
        some = counts(answers[length::4])
        assert chi_square_excess(some, expected_counts(slots=SLOTS / 4)) < 0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_filters_of_the_target_hold_whatever_is_drafted(rule):
    filters = Filters(mx.full(SLOTS, 3), mx.full(SLOTS, 0.8), mx.full(SLOTS, 0.05))
    p = np.array(mx.softmax(TARGET, axis=-1), np.float64)
    for row in p:  # by hand: top 3, min-p relative to the best, then 0.8 of what is left
        row[np.argsort(row)[0]] = 0
        row[row < 0.05 * row.max()] = 0
        row /= row.sum()
        order = np.argsort(-row)
        row[order[1:][np.cumsum(row[order])[:-1] >= 0.8]] = 0
        row /= row.sum()
    expected = SLOTS * np.einsum("a,ab,bc->abc", p[0], p, p)
    assert chi_square_excess(counts(decode(rule, settings(1.0, filters))), expected) < 0


class ResidualOfTarget(Rejection):
    """Draws from p behind a rejected draft, instead of from what p has more than q."""

    def verify(self, drafts, verify_len, logits):
        accepted, _ = super().verify(drafts, verify_len, logits)
        p = mx.softmax(logits / self._settings.temperature[:, None, None], axis=-1)
        row = mx.take_along_axis(p, accepted[:, None, None], axis=1)[:, 0]
        noise = self._chance.bonus_uniform(accepted)[:, None]
        return accepted, (mx.cumsum(row, axis=-1) <= noise).sum(axis=-1).astype(mx.int32)


class ProposalNotDrawnFrom(Rejection):
    """Draws at the temperature but accepts by the distribution at temperature 1.2."""

    def draft(self, logits, k, among=None):
        token = super().draft(logits, k, among)
        self._proposals[-1] = mx.softmax(logits / 1.2, axis=-1)
        return token


class OneUniformForAll(Rejection):
    """Uses the number that drew a draft to accept it too."""

    def __init__(self, settings, chance):
        super().__init__(settings, chance)
        chance.accept_uniforms = lambda n: mx.stack([chance.draft_uniform(k) for k in range(n)], 1)


def stuck(rule):
    """Make a rule whose noise does not move with the answer position."""

    def make(settings, chance):
        chance._positions = mx.zeros_like(chance._positions)
        return rule(settings, chance)

    return make


class SameNoiseAlongTheBlock(Coupled):
    """Gives every row of a verify pass the noise of its first."""

    def verify(self, drafts, verify_len, logits):
        rows = [self._noisy(logits[:, i : i + 1], 0) for i in range(logits.shape[1])]
        return Greedy().verify(drafts, verify_len, mx.concatenate(rows, axis=1))


@pytest.mark.parametrize(
    "wrong",
    [
        ResidualOfTarget,
        ProposalNotDrawnFrom,
        OneUniformForAll,
        SameNoiseAlongTheBlock,
        stuck(Coupled),
        stuck(Rejection),
    ],
)
def test_a_wrong_rule_is_noticed(wrong):
    assert chi_square_excess(counts(decode(wrong, settings())), expected_counts()) > 0


@pytest.mark.parametrize("drafter", [TARGET, DRAFTER, -TARGET], ids=["target", "other", "worst"])
@pytest.mark.parametrize("num_drafts", [1, 3])
def test_coupled_answers_are_plain_samples_with_the_same_noise(drafter, num_drafts):
    plain = []
    anchor = mx.zeros(SLOTS, dtype=mx.int32)
    for position in range(LENGTH):
        noise = Chance(keys(), mx.full(SLOTS, position))
        anchor = Coupled(settings(), noise).first(TARGET[anchor])
        plain.append(np.array(anchor))
    answers = decode(Coupled, settings(), drafter, num_drafts)
    assert np.array_equal(answers, np.stack(plain, axis=1))


def one_draft(rule, p, q):
    """Draft once from q for a target with p; return the share that is accepted."""
    log_p, log_q = (mx.broadcast_to(mx.log(mx.array(x)), (SLOTS, len(x))) for x in (p, q))
    this = rule(settings(), Chance(keys(), mx.zeros(SLOTS, mx.int32)))
    drafts = this.draft(log_q, 0).astype(mx.int32)[:, None]
    accepted, _ = this.verify(drafts, mx.ones(SLOTS, mx.int32), mx.stack([log_p, log_p], axis=1))
    return accepted.astype(mx.float32).mean().item()


PAIRS = [
    ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2]),
    ([0.25] * 4, [0.4, 0.3, 0.2, 0.1]),
    ([0.05] * 20, [0.075] * 10 + [0.025] * 10),
]
SIGMA = 0.5 / SLOTS**0.5


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_rejection_accepts_one_minus_the_total_variation(p, q):
    assert abs(one_draft(Rejection, p, q) - np.minimum(p, q).sum()) < 4 * SIGMA


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_coupled_accepts_what_its_bound_promises(p, q):
    distance = 1 - np.minimum(p, q).sum()
    share = one_draft(Coupled, p, q)
    assert (1 - distance) / (1 + distance) - 4 * SIGMA < share < 1 - distance + 4 * SIGMA


class DrafterWithItsOwnNoise(Coupled):
    """Drafts with the noise of another item."""

    def draft(self, logits, k, among=None):
        other = Chance(self._chance._keys + 1_000_000, self._chance._positions)
        return Coupled(self._settings, other).draft(logits, k, among)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_a_drafter_with_noise_of_its_own_falls_below_the_bound(p, q):
    distance = 1 - np.minimum(p, q).sum()
    share = one_draft(DrafterWithItsOwnNoise, p, q)
    assert abs(share - np.dot(p, q)) < 4 * SIGMA
    assert share < (1 - distance) / (1 + distance) - 4 * SIGMA


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_slots_at_temperature_0_are_greedy_bit_for_bit_among_sampled_ones(rule):
    shape = (6, 4, 50)
    logits, base = (
        mx.random.normal(shape, key=mx.random.key(s)).astype(mx.bfloat16) for s in (1, 2)
    )
    logits = mx.where(mx.arange(6)[:, None, None] % 3 == 0, base, logits)  # some accept
    mixed = Settings(mx.array([0.0, 0.0, 0.0, 0.7, 1.0, 2.0]))
    sampled = rule(mixed, Chance(keys(6), mx.arange(6)))
    drafts = [mx.stack([r.draft(base[:, k], k) for k in range(3)], 1) for r in (sampled, Greedy())]
    assert drafts[0][:3].tolist() == drafts[1][:3].tolist()
    lens = mx.array([3, 3, 3, 3, 2, 1])
    ours = sampled.verify(drafts[0].astype(mx.int32), lens, logits)
    greedy = Greedy().verify(drafts[1].astype(mx.int32), lens, logits)
    for one, other in zip(ours, greedy, strict=True):
        assert one[:3].tolist() == other[:3].tolist()
    firsts = sampled.first(logits[:, 0])[:3].tolist(), Greedy().first(logits[:, 0])[:3].tolist()
    assert firsts[0] == firsts[1]


# Causality: whether a draft is verified must not depend on what it is, or on later ones. Numbers
# of the paper's appendix A: two drafts, of which the second's confidence depends on the first.
P, Q = (0.7, 0.3), (0.5, 0.5)
STEPS_PER_S = {1: 1.0, 2: 0.5, 3: 0.45}  # by tokens of a step
FIRST_CONFIDENCE, SECOND_CONFIDENCE = 0.8, (0.9, 1e-6)  # after A, after B


def throughputs(second):
    """Expected tokens per second of verifying 0, 1 and 2 drafts."""
    tokens = np.cumsum([1.0, FIRST_CONFIDENCE, FIRST_CONFIDENCE * second])
    return [tokens[n] * STEPS_PER_S[1 + n] for n in range(3)]


def best_length(second):
    """Search all lengths: the length then tells what the first draft is."""
    return int(np.argmax(throughputs(second)))


def early_stop_length(second):
    """Stop at the first length that does not improve."""
    rates = throughputs(second)
    return next((n for n in range(2) if rates[n + 1] <= rates[n]), 2)


def by_draft(length_of):
    lengths = mx.array([length_of(second) for second in SECOND_CONFIDENCE])
    return lambda drafts: lengths[drafts[:, 0]]


def by_threshold(drafts):
    confidence = mx.array(
        [[FIRST_CONFIDENCE, SECOND_CONFIDENCE[0]], [FIRST_CONFIDENCE, SECOND_CONFIDENCE[1]]]
    )
    logits = mx.log(confidence) - mx.log1p(-confidence)
    return threshold_lengths(logits[drafts[:, 0]], 0.5)


def first_token_share(rule, choose_length):
    """Draft two tokens, let the lengths be chosen, and return how often A comes first."""
    log_p, log_q = (mx.broadcast_to(mx.log(mx.array(x)), (SLOTS, 2)) for x in (P, Q))
    this = rule(settings(), Chance(keys(), mx.zeros(SLOTS, mx.int32)))
    drafts = mx.stack([this.draft(log_q, k).astype(mx.int32) for k in range(2)], axis=1)
    accepted, bonus = this.verify(drafts, choose_length(drafts), mx.stack([log_p] * 3, axis=1))
    return (mx.where(accepted > 0, drafts[:, 0], bonus) == 0).astype(mx.float32).mean().item()


def test_choosing_the_length_by_what_was_drafted_bends_the_distribution():
    assert [best_length(second) for second in SECOND_CONFIDENCE] == [2, 0]
    assert abs(first_token_share(Rejection, by_draft(best_length)) - 0.85) < 4 * SIGMA


@pytest.mark.parametrize("choose", [by_draft(early_stop_length), by_threshold])
def test_early_stop_and_threshold_keep_the_distribution(choose):
    assert abs(first_token_share(Rejection, choose) - P[0]) < 4 * SIGMA


def test_coupled_noise_keeps_the_distribution_however_lengths_are_chosen():
    assert abs(first_token_share(Coupled, by_draft(best_length)) - P[0]) < 4 * SIGMA
