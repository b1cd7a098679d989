"""How many drafts pay: found from the times of rounds, in simulations whose costs are known."""

from functools import cache
from itertools import pairwise
from math import log
from random import Random
from typing import NamedTuple

import pytest

from dspark_batch.tuning.pace import Acceptance, Costs, Kind, Pace, Step, accept_length

LENGTHS = tuple(range(8))
RULE_CPU = (1.0, 1 / 24, 0.3, 0.3 / 24)
RULE_GPU = (1.0, 1 / 512, 0.2, 0.2 / 512)


# The accept length


def test_the_accept_length_counts_the_bonus_and_no_more_than_the_width():
    assert accept_length((0.5, 0.25), 1) == 1
    assert accept_length((0.5, 0.25), 2) == 1.5
    assert accept_length((0.5, 0.25), 8) == 1.75


# How far drafts survive


def test_before_any_round_survival_is_the_priors():
    assert Acceptance(prior=0.5).survival(3) == (0.5, 0.25, 0.125)
    assert Acceptance().survival(0) == ()


def accepted(random, conditional, draft_length):
    number = 0
    while number < draft_length and random.random() < conditional[number]:
        number += 1
    return number


def test_acceptance_is_learnt_by_position():
    random, acceptance, conditional = Random(1), Acceptance(64), (0.9, 0.5, 0.8)
    for _ in range(5000):
        acceptance.add(accepted(random, conditional, 3), 3)
    assert acceptance.survival(3) == pytest.approx((0.9, 0.45, 0.36), abs=0.06)


def test_a_miss_says_nothing_about_what_lies_behind_it():
    acceptance = Acceptance(prior=0.5, prior_weight=1)
    acceptance.add(0, 7)
    assert acceptance.survival(2) == pytest.approx((0.25, 0.0625))  # the second is like the first
    acceptance.add(1, 1)  # nor does a round that verified one draft
    first, second = acceptance.survival(2)
    assert second == pytest.approx(first**2)


def test_a_change_is_followed_within_two_half_lives():
    acceptance = Acceptance(prior_weight=16)
    for _ in range(5000):
        acceptance.add(1, 1)
    assert acceptance.survival(1)[0] > 0.98
    for _ in range(512):
        acceptance.add(0, 1)
    assert acceptance.survival(1)[0] == pytest.approx(0.25, abs=0.05)


def test_rounds_without_drafts_let_knowledge_fade_to_the_prior():
    acceptance = Acceptance(prior=0.8)
    for _ in range(5000):
        acceptance.add(0, 1)
    assert acceptance.survival(1)[0] < 0.05
    for _ in range(5000):
        acceptance.add(0, 0)
    assert acceptance.survival(1)[0] == pytest.approx(0.8, abs=0.01)


def test_hope_forgets_all():
    acceptance = Acceptance(prior=0.5)
    for _ in range(100):
        acceptance.add(0, 2)
    acceptance.hope_again()
    assert acceptance.survival(2) == (0.5, 0.25)


@pytest.mark.parametrize("counts", [(2, 1), (-1, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="drafts accepted: expected"):
        Acceptance().add(*counts)


# What rounds take


def test_before_any_round_the_rule_is_believed():
    costs = Costs((1.0, 0.5, 0.25, 0.125))
    assert costs.round_s(Kind(4, 0)) == pytest.approx(1 + 4 * 0.5)
    assert costs.round_s(Kind(4, 3)) == pytest.approx(1 + 16 * 0.5 + 0.25 + 12 * 0.125)
    assert not costs.is_known(Kind(4, 3))


def test_a_kind_of_round_takes_what_a_quarter_of_its_last_ones_stay_below():
    costs, kind = Costs(RULE_CPU), Kind(4, 3)
    for seconds in (5.0, 1.0, 90.0):
        assert not costs.is_known(kind)
        costs.add(kind, seconds)
    assert costs.is_known(kind)
    assert costs.round_s(kind) == 1.0  # the first ones of a job are slow
    for seconds in (4.0, 3.0, 5.0, 6.0, 7.0):
        costs.add(kind, seconds)
    assert costs.round_s(kind) == 4.0


def test_a_kind_that_was_tried_in_a_slow_minute_is_not_slower():
    costs, usual, better = Costs(RULE_CPU), Kind(1, 4), Kind(1, 7)
    for slow in (1.0, 3.0):
        for _ in range(20):
            costs.add(usual, slow * 1.0)
    for _ in range(4):
        costs.add(better, 3.0 * 0.9)
    for _ in range(20):
        costs.add(usual, 1.0)
    assert costs.round_s(better) == pytest.approx(0.9)
    assert costs.round_s(usual) == pytest.approx(1.0)


def test_a_kind_that_was_learnt_just_when_a_slow_moment_ended_is_learnt_again():
    costs, usual, other = Costs(RULE_CPU), Kind(1, 0), Kind(1, 7)
    for _ in range(20):
        costs.add(usual, 1.0)
    for _ in range(11):
        costs.add(usual, 1.5)
    for _ in range(100):  # each of them looks slow beside what the first ones were taken for
        costs.add(other, 2.0)
    assert costs.round_s(other) == pytest.approx(2.0)
    assert costs.round_s(usual) == pytest.approx(1.0)


def test_a_machine_that_stays_slow_is_slow_for_kinds_that_nobody_sees():
    costs, usual, plain = Costs(RULE_CPU), Kind(1, 7), Kind(1, 0)
    for kind, count in ((usual, 80), (plain, 5), (usual, 20)):
        for _ in range(count):
            costs.add(kind, 1.0 if kind is usual else 0.6)
    for slow in (2.0, 1.0):
        for _ in range(60):
            costs.add(usual, slow * 1.0)
        assert costs.round_s(usual) == pytest.approx(slow)
        assert costs.round_s(plain) == pytest.approx(slow * 0.6)


def test_what_rounds_take_stays_what_it_is_however_the_machine_swings():
    costs, kind = Costs(RULE_CPU), Kind(1, 7)
    for n in range(5000):
        costs.add(kind, 1.5 if n // 40 % 2 else 1.0)
        assert 0.9 <= costs.round_s(kind) <= 1.6 or n < 3


def test_a_neighbour_who_takes_the_machine_for_a_moment_changes_nothing():
    costs, kind = Costs(RULE_CPU), Kind(1, 0)
    for seconds in (1.0, 1.0, 60.0, 1.0, 60.0, 1.0, 60.0):
        costs.add(kind, seconds)
    assert costs.round_s(kind) == 1.0


def test_two_rounds_or_old_ones_say_nothing():
    costs, kind = Costs(RULE_CPU), Kind(1, 7)
    for _ in range(3):
        costs.add(kind, 1.0)
    for _ in range(511):
        costs.add(Kind(1, 0), 1.0)
    assert costs.is_known(kind)
    costs.add(Kind(1, 0), 1.0)
    assert not costs.is_known(kind)
    costs.add(kind, 1.0)
    assert not costs.is_known(kind)  # the old ones do not come back


def test_the_parts_are_estimated_from_what_was_seen():
    truth = (0.01, 0.0005, 0.004, 0.0002)
    costs = Costs(RULE_CPU)
    kinds = [Kind(slots, k) for slots in (1, 4, 16) for k in (0, 2, 7)]
    for kind in kinds * 3:
        costs.add(kind, sum(w * n for w, n in zip(truth, kind.parts, strict=True)))
    for unseen in (Kind(8, 0), Kind(8, 4), Kind(2, 7)):
        expected = sum(w * n for w, n in zip(truth, unseen.parts, strict=True))
        assert costs.round_s(unseen) == pytest.approx(expected, rel=0.3)
    assert min(costs.weights()) > 0


def test_weights_are_seconds_from_the_first_round_on():
    costs = Costs(RULE_CPU)
    for _ in range(3):
        costs.add(Kind(1, 0), 1e-3 * (1 + 1 / 24))
    assert costs.weights() == pytest.approx(tuple(1e-3 * part for part in RULE_CPU), rel=0.01)


@pytest.mark.parametrize("zero", [0.0, -5.0])
def test_seconds_of_a_broken_clock_break_nothing(zero):
    costs = Costs(RULE_CPU)
    pace = Pace(costs, Acceptance(), LENGTHS)
    for _ in range(50):
        step = pace.next(1, 1)
        assert step.draft_length in LENGTHS
        costs.add(Kind(1, step.draft_length), zero)


# A job of known costs


class Machine(NamedTuple):
    """What a round takes there, in target passes."""

    rule: tuple[float, ...]
    fixed: float  # of the drafter
    rows: float  # that are as dear as a pass
    least: int = 0  # rows that are always paid for
    by_draft: float = 0.0

    def round_s(self, slots, drafts):
        target = 1 + max(self.least, slots * (1 + drafts)) / self.rows
        if not drafts:
            return target
        return target + self.fixed * (1 + slots * drafts / self.rows) + self.by_draft * drafts


MACHINES = {
    "cpu": Machine(RULE_CPU, fixed=0.35, rows=25, least=16, by_draft=0.02),
    "cpu with a cheap drafter": Machine(RULE_CPU, fixed=0.1, rows=60),
    "gpu": Machine(RULE_GPU, fixed=0.2, rows=600, by_draft=0.01),
    "where rows are dear": Machine(RULE_CPU, fixed=0.5, rows=8),
}
# Tokens of a round with seven drafts -> the chance of each draft.
CHANCES = {1.3: 0.25, 2: 0.5, 3: 0.68, 5: 0.87, 7: 0.965}


def seconds_of_job(machine, chance, slots, draft_length, seed, *, items=100, busy=0.0, slow=()):
    """Simulate a job; a draft length of None is chosen by the pace.

    A pass runs over all slots, the free ones too, until a quarter of them is free: as `Slots` does.
    Keeping the drafter ready costs a twentieth of a pass. Each time is off by up to a tenth, and
    `busy` of the rounds take ten times as long, and those of the ranges `slow` twice as long.
    """
    random = Random(seed)
    costs, acceptance = Costs(machine.rule), Acceptance(slots)
    pace = Pace(costs, acceptance, LENGTHS, slots)
    step = pace.step if draft_length is None else Step(draft_length, draft_length > 0)
    left = [random.randint(20, 100) for _ in range(items)]
    active, took = [], 0.0  # tokens to come, and whether the drafter knows the context
    held = 0  # slots
    while left or active:
        while left and len(active) < slots:
            active.append([left.pop(), True])
        held = len(active) if 4 * len(active) <= 3 * held else max(held, len(active))
        drafts = step.draft_length
        if not step.keeps_context:
            active = [[tokens, False] for tokens, _ in active]
        seconds = machine.round_s(held, drafts)
        seconds += 0.05 * machine.round_s(held, 0) * step.keeps_context
        seen = seconds * random.uniform(0.9, 1.1)
        seen *= 10 if random.random() < busy else 1
        seen *= 2 if any(costs.num_rounds in some for some in slow) else 1
        took += seconds
        for each in active:
            kept = min(drafts, int(log(1 - random.random()) / log(chance))) if each[1] else 0
            if each[1] and draft_length is None:
                acceptance.add(kept, drafts)
            each[0] -= kept + 1
        active = [each for each in active if each[0] > 0]
        if draft_length is None and active:
            costs.add(Kind(held, drafts), seen)
            step = pace.next(held, sum(is_ready for _, is_ready in active))
    return took


def share_of_best(machine, chance, slots, *, seeds=(0,), **options):
    """Compare the pace with the best fixed draft length, over one job or some."""
    best = min(
        sum(seconds_at(k, machine._replace(rule=()), chance, slots, seed) for seed in seeds)
        for k in LENGTHS
    )
    jobs = (seconds_of_job(machine, chance, slots, None, seed, **options) for seed in seeds)
    return best / sum(jobs)


@cache
def seconds_at(draft_length, machine, chance, slots, seed):
    """Simulate a job at one draft length: whatever the rule says, and whoever is busy."""
    machine = machine._replace(rule=RULE_CPU)
    return seconds_of_job(machine, chance, slots, draft_length, seed)


@pytest.mark.parametrize(("name", "slots"), [("cpu", 1), ("cpu", 4), ("cpu", 16), ("gpu", 4)])
@pytest.mark.parametrize("tokens", CHANCES)
def test_a_job_takes_at_most_5_percent_longer_than_with_the_best_draft_length(name, tokens, slots):
    assert share_of_best(MACHINES[name], CHANCES[tokens], slots, seeds=range(1 + slots // 3)) > 0.95


SLOW = {
    "at times": [range(150, 210), range(400, 440), range(700, 1000)],
    "from early on": [range(40, 10**6)],
}


@pytest.mark.parametrize("tokens", CHANCES)
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("slow", SLOW.values(), ids=SLOW)
def test_so_it_does_on_a_machine_that_is_slow_for_long(slow, slots, tokens):
    assert share_of_best(MACHINES["cpu"], CHANCES[tokens], slots, seeds=range(3), slow=slow) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 4, 16, 32])
@pytest.mark.parametrize("tokens", CHANCES)
@pytest.mark.parametrize("name", MACHINES)
def test_so_do_many_jobs_on_other_machines(name, tokens, slots):
    assert share_of_best(MACHINES[name], CHANCES[tokens], slots, seeds=range(3)) > 0.95


@pytest.mark.parametrize("tokens", [1.3, 3, 7])
def test_where_others_take_the_machine_at_times_little_is_lost(tokens):
    assert share_of_best(MACHINES["cpu"], CHANCES[tokens], 4, busy=0.1, seeds=range(3)) > 0.9


@pytest.mark.parametrize("tokens", [2, 3])
def test_one_disturbed_round_decides_no_job(tokens):
    assert share_of_best(MACHINES["cpu"], CHANCES[tokens], 16, seeds=range(4), busy=0.03) > 0.95


@pytest.mark.parametrize("factors", [(9, 9, 9, 9), (1, 3, 1, 1), (3, 1, 1, 1), (1, 1, 9, 9)])
@pytest.mark.parametrize("tokens", [1.3, 3, 7])
def test_a_hint_that_is_wrong_is_corrected_by_the_rounds(tokens, factors):
    wrong = tuple(part * factor for part, factor in zip(RULE_CPU, factors, strict=True))
    machine = MACHINES["cpu"]._replace(rule=wrong)
    assert share_of_best(machine, CHANCES[tokens], 4) > 0.88


def test_a_hint_that_praises_drafts_makes_no_job_slower_than_without():
    machine = MACHINES["cpu"]._replace(rule=(1.0, 0.0, 0.0, 0.0))
    assert share_of_best(machine, CHANCES[1.3], 4) > 0.9


# What the pace does


def paced(pace, costs, acceptance, rounds, round_s, *, slots=1, kept=0, served=True):
    """Run rounds; return the steps."""
    steps = []
    for _ in range(rounds):
        step = pace.next(slots, slots if served else 0)
        steps.append(step)
        costs.add(Kind(slots, step.draft_length), round_s(step.draft_length))
        if served:
            acceptance.add(min(kept, step.draft_length), step.draft_length)
    return steps


def made(lengths=LENGTHS, rule=RULE_CPU, slots=1):
    costs, acceptance = Costs(rule), Acceptance(slots)
    return Pace(costs, acceptance, lengths, slots), costs, acceptance


@pytest.mark.parametrize(("slots", "first"), [(1, 7), (16, 2), (32, 1)])
def test_a_job_begins_with_the_fewest_drafts_that_promise_nearly_most(slots, first):
    pace, *_ = made(slots=slots)
    assert pace.step == Step(first)


def test_the_first_rounds_with_drafts_have_no_more_than_the_first_one():
    """Whatever the clock tells, or does not: here it tells of no round."""
    pace, _, acceptance = made(slots=16)
    steps = [pace.step]
    for _ in range(5):
        for _ in range(16):
            acceptance.add(steps[-1].draft_length, steps[-1].draft_length)
        steps.append(pace.next(16, 16))
    assert [step.draft_length for step in steps[:3]] == [2, 2, 2]
    assert steps[-1].draft_length > 2


def test_first_rounds_without_drafts_that_were_slow_are_looked_at_again():
    """The first rounds of a job take longer; later ones show that drafts do not pay."""
    pace, costs, acceptance = made(slots=16)
    for _ in range(60):
        step = pace.next(16, 16)
        plain_s = 1.65 if costs.num_rounds < 6 else 1.0
        costs.add(Kind(16, step.draft_length), 2.2 if step.draft_length else plain_s)
        for slot in range(16 if step.keeps_context else 0):
            acceptance.add(min(slot % 3, step.draft_length), step.draft_length)
    assert step.draft_length == 0


def test_many_slots_try_early_what_is_cheap_there():
    pace, costs, acceptance = made(slots=32)
    steps = paced(pace, costs, acceptance, 30, lambda k: 3.0 + 7 * (k > 0) + k, slots=32, kept=0)
    assert sum(step.draft_length > 0 for step in steps) <= 3
    assert not steps[-1].keeps_context


def test_drafts_that_look_disturbed_are_not_given_up_at_once():
    pace, costs, acceptance = made(slots=32)
    pace.next(32, 32)
    costs.add(Kind(32, 4), 1000.0)
    steps = paced(pace, costs, acceptance, 30, lambda k: 3.0 + 0.1 * k, slots=32, kept=7)
    assert steps[-1].draft_length == 7


def test_an_estimate_of_rounds_that_nobody_saw_gives_up_no_drafts():
    pace, costs, acceptance = made(slots=64)
    rounds = ((0, 11.4), (0, 11.5), (0, 11.6), (1, 25), (4, 59), (7, 95))  # each length seen once
    for draft_length, seconds in rounds:
        costs.add(Kind(64, draft_length), seconds)
    for _ in range(64):
        acceptance.add(6, 7)
    drafted = [pace.next(64, 64).draft_length]
    for _ in range(3):
        costs.add(Kind(64, drafted[-1]), 36.0)
        drafted.append(pace.next(64, 64).draft_length)
    assert 0 not in drafted[:3]
    assert costs.is_known(Kind(64, drafted[0]))


def test_plain_rounds_are_worth_what_they_are_while_the_drafter_rests():
    costs = Costs(RULE_CPU, upkeep=0.1)
    for _ in range(3):
        costs.add(Kind(4, 0), 2.0)
    assert costs.round_s(Kind(4, 0, rests=True)) == pytest.approx(1.8)
    pace = Pace(costs, Acceptance(4), LENGTHS, 4)
    assert 2.0 * pace._rates(4)[0] == pytest.approx(1 / 0.9)
    for _ in range(3):
        costs.add(Kind(4, 0, rests=True), 1.5)
    assert costs.round_s(Kind(4, 0, rests=True)) == pytest.approx(1.5)
    assert costs.round_s(Kind(4, 0)) == pytest.approx(2.0)


def test_a_long_rest_says_what_rounds_with_a_context_take():
    costs = Costs(RULE_CPU, upkeep=0.2)
    for _ in range(600):  # nothing else is remembered
        costs.add(Kind(4, 0, rests=True), 4.0)
    whole = sum(RULE_CPU[part] * Kind(4, 0).parts[part] for part in range(4))
    drafted = sum(RULE_CPU[part] * Kind(4, 7).parts[part] for part in range(4))
    assert costs.round_s(Kind(4, 7)) == pytest.approx(5.0 * drafted / whole, rel=0.01)


def test_where_drafts_never_pay_the_drafter_rests_and_is_tried_again_and_again():
    pace, *rest = made()
    steps = paced(pace, *rest, 4000, lambda k: 1.0 + (k > 0), kept=0)
    drafted = [number for number, step in enumerate(steps) if step.draft_length]
    rests = [number for number, step in enumerate(steps) if not step.keeps_context]
    assert drafted[0] == 0
    assert len(rests) / len(steps) > 0.97
    assert max(drafted) > 500  # after a rest
    assert len([a for a, b in pairwise(drafted) if b - a > 500]) >= 2


def test_a_drafter_is_not_tried_before_half_of_the_slots_can_draft():
    pace, costs, acceptance = made()
    while pace.step.keeps_context:
        paced(pace, costs, acceptance, 1, lambda k: 1.0 + (k > 0), kept=0, slots=4)
    rest = paced(pace, costs, acceptance, 1100, lambda k: 1.0, slots=4, served=False)
    assert {step.draft_length for step in rest} == {0}
    assert rest[-1].keeps_context  # for newcomers
    assert pace.next(4, 1) == Step(0)
    assert pace.next(4, 2) == Step(7)


def test_drafts_that_begin_to_pay_are_found_after_the_rest():
    pace, costs, acceptance = made()
    paced(pace, costs, acceptance, 300, lambda k: 1.0 + (k > 0), kept=0)
    later = paced(pace, costs, acceptance, 1500, lambda k: 1.0 + 0.1 * (k > 0), kept=7)
    assert [step.draft_length for step in later[-200:]] == [7] * 200


def test_a_length_is_left_only_for_3_percent():
    pace, costs, acceptance = made((0, 3, 7))
    paced(pace, costs, acceptance, 50, lambda k: {0: 5.0, 3: 1.0, 7: 2.0}[k], kept=7)
    assert pace.step.draft_length in (3, 7)
    last = pace.step.draft_length
    other = 10 - last
    rate = {3: 4.0, 7: 8.0}

    def nearly_equal(drafts):
        return 5.0 if drafts == 0 else rate[drafts] / rate[last] * (0.99 if drafts == other else 1)

    steps = paced(pace, costs, acceptance, 100, nearly_equal, kept=7)
    tried_once = {0}  # every longer job sees what rounds take without drafts
    assert {step.draft_length for step in steps[10:]} - tried_once == {last}


def test_plain_rounds_of_which_one_counted_are_not_tried_again():
    pace, costs, acceptance = made((0, 7))
    plain = 0
    for _ in range(100):
        step = pace.next(64, 64)
        plain += step.draft_length == 0
        if step.draft_length:
            acceptance.add(7, 7)
            costs.add(Kind(64, 7), 4.5)
        elif plain == 1:  # the others ran beside prompts, so nobody knows what they take
            costs.add(Kind(64, 0), 1.0)
    assert plain == 3  # one trial


def test_a_pair_without_a_drafter_never_drafts():
    pace, costs, acceptance = made((0,))
    steps = paced(pace, costs, acceptance, 100, lambda k: 1.0)
    assert {step.draft_length for step in steps} == {0}


def test_the_same_rounds_give_the_same_paces():
    def once():
        pace, *rest = made()
        random = Random(5)
        return paced(pace, *rest, 500, lambda k: random.uniform(1, 2) + 0.1 * k, kept=2)

    assert once() == once()


def test_a_draft_length_that_was_chosen_twice_stays_for_some_rounds(monkeypatch):
    pace, costs, acceptance = made((0, 7))
    chosen = []
    real = pace._next
    monkeypatch.setattr(pace, "_next", lambda *args: chosen.append(args) or real(*args))
    paced(pace, costs, acceptance, 32, lambda k: 1.0 + 0.1 * (k > 0), kept=7)
    assert len(chosen) == 32  # in a young job none
    paced(pace, costs, acceptance, 200, lambda k: 1.0 + 0.1 * (k > 0), kept=7)
    assert 50 <= len(chosen) - 32 < 80
    before = len(chosen)
    for slots in (3, 2, 1):  # but where a pass runs over fewer slots
        pace.next(slots, slots)
    assert len(chosen) - before == 3
