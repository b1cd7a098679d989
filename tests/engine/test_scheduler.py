"""The policy against exhaustive search, and against a machine that is only numbers."""

import itertools
import json
from random import Random

import pytest

from dspark_batch.engine.scheduler import (
    Acceptance,
    DrafterPass,
    LiveCurve,
    Pace,
    StepCurve,
    TargetPass,
    accept_length,
    best_count,
    best_plan,
    can_pay,
    next_draft_length,
    next_pace,
    verify_lengths,
)

SEEDS = range(60)
PAPER_SPS = {1: 1.0, 2: 0.5, 3: 0.45}  # steps per second by tokens; appendix A


def curve_of(seconds, slots=(1, 2, 4, 8), block_size=7, draft_s=0.1, host_s=0.05):
    """A curve with every shape of these slots, from seconds by (slots, width)."""
    widths = range(1, block_size + 2)
    target = tuple(TargetPass(s, w, seconds(s, w)) for s in slots for w in widths)
    return StepCurve(target, tuple(DrafterPass(s, draft_s) for s in slots), host_s)


def survival_of(conditional):
    return tuple(itertools.accumulate(conditional, lambda a, c: a * c))


def random_curve(random):
    """Any shapes at any price: wider may even be cheaper, as measured tables are."""
    shapes = {(random.randint(1, 8), random.randint(1, 6)) for _ in range(random.randint(1, 10))}
    target = tuple(TargetPass(*shape, random.uniform(0.1, 2)) for shape in sorted(shapes))
    counts = random.sample(range(1, 9), random.randint(0, 3))
    drafter = tuple(DrafterPass(s, random.uniform(0.01, 0.5)) for s in counts)
    return StepCurve(target, drafter, random.uniform(0, 0.2))


def random_survival(random, block_size):
    """Running products, with ties and zeros among them."""
    return survival_of(random.choice([0, 0.5, 1, random.random()]) for _ in range(block_size))


# The curve


def test_a_shape_that_was_not_measured_is_padded_to_the_cheapest_that_covers_it():
    curve = StepCurve((TargetPass(4, 2, 1.0), TargetPass(8, 4, 2.0), TargetPass(8, 8, 1.5)))
    assert curve.shape(3, 2) == (4, 2)
    assert curve.shape(5, 3) == (8, 8)  # measured faster than the narrower one
    assert curve.verify_s(5, 3) == 1.5


def test_equal_seconds_go_to_the_smaller_shape():
    curve = StepCurve((TargetPass(8, 8, 1.0), TargetPass(4, 8, 1.0), TargetPass(4, 4, 1.0)))
    assert curve.shape(1, 1) == (4, 4)


def test_the_drafter_takes_the_fewest_rows_that_cover():
    drafter = (DrafterPass(8, 0.1), DrafterPass(4, 0.3), DrafterPass(2, 0.2))
    curve = StepCurve((TargetPass(8, 8, 1.0),), drafter)
    assert [curve.draft_s(slots) for slots in (1, 3, 8)] == [0.2, 0.3, 0.1]


def test_what_nothing_covers_is_refused():
    curve = StepCurve((TargetPass(4, 2, 1.0), TargetPass(2, 4, 1.0)), (DrafterPass(2, 0.1),))
    with pytest.raises(ValueError, match="No measured target pass covers 3 slots of width 3"):
        curve.shape(3, 3)
    with pytest.raises(ValueError, match="No measured drafter pass covers 3 slots"):
        curve.draft_s(3)
    assert (curve.covers(3, 0), curve.covers(3, 1), curve.covers(2, 3)) == (True, False, True)


@pytest.mark.parametrize(
    "target", [(), (TargetPass(1, 1, 0.0),), (TargetPass(1, 1, float("nan")),)]
)
def test_a_curve_without_time_is_refused(target):
    with pytest.raises(ValueError, match="more than 0 seconds"):
        StepCurve(target)


@pytest.mark.parametrize("seed", range(20))
def test_a_curve_survives_its_json(seed):
    curve = random_curve(Random(seed))
    assert StepCurve.from_json(json.loads(json.dumps(curve.to_json()))) == curve


def test_the_accept_length_counts_the_bonus_and_no_more_than_the_width():
    assert accept_length((0.5, 0.25), 1) == 1
    assert accept_length((0.5, 0.25), 2) == 1.5
    assert accept_length((0.5, 0.25), 8) == 1.75


def test_a_round_without_drafts_does_not_pay_the_drafter():
    curve = curve_of(lambda s, w: w, draft_s=0.7, host_s=0.3)
    assert curve.tokens_per_s((0.5,), 2, 0) == pytest.approx(2 / 1.3)
    assert curve.tokens_per_s((0.5,), 2, 1) == pytest.approx(2 * 1.5 / 3.0)


# The plan of a job


def naive_rate(curve, survival, slots, draft_length):
    """Tokens per second of a round, by the definition; None: not measured."""
    target = [p.seconds for p in curve.target if p.slots >= slots and p.width >= draft_length + 1]
    drafter = sorted((p.slots, p.seconds) for p in curve.drafter if p.slots >= slots)
    if not target or (draft_length > 0 and not drafter):
        return None
    draft_s = drafter[0][1] if draft_length > 0 else 0
    tokens = slots * (1 + sum(survival[k] for k in range(draft_length)))
    return tokens / (draft_s + min(target) + curve.host_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_plan_is_more_than_a_hundredth_better(seed):
    random = Random(seed)
    curve, survival = random_curve(random), random_survival(random, 5)
    most_slots = random.choice([None, 1, 3, 8])
    plan = best_plan(curve, survival, most_slots=most_slots)
    every = [
        naive_rate(curve, survival, slots, draft_length)
        for slots in range(1, (most_slots or 8) + 1)
        for draft_length in range(6)
    ]
    assert plan.tokens_per_s >= 0.99 * max(rate for rate in every if rate is not None)
    assert plan.tokens_per_s == pytest.approx(
        naive_rate(curve, survival, plan.slots, plan.draft_length)
    )
    assert plan.slots <= (most_slots or 8)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_user_fixed_is_kept_and_the_rest_is_best(seed):
    random = Random(seed)
    curve, survival = curve_of(lambda s, w: random.uniform(0.1, 2)), random_survival(random, 7)
    slots, draft_length = random.randint(1, 8), random.randint(0, 7)
    by_length = best_plan(curve, survival, slots=slots)
    by_slots = best_plan(curve, survival, draft_length=draft_length)
    rates = [naive_rate(curve, survival, slots, k) for k in range(8)]
    assert by_length.slots == slots
    assert by_length.tokens_per_s >= 0.99 * max(rates)
    assert by_slots.draft_length == draft_length
    assert by_slots.tokens_per_s >= 0.99 * max(
        naive_rate(curve, survival, s, draft_length) for s in range(1, 9)
    )
    both = best_plan(curve, survival, slots=slots, draft_length=draft_length)
    assert (both.slots, both.draft_length) == (slots, draft_length)


def test_equal_plans_go_to_fewer_slots_and_then_to_shorter_drafts():
    curve = curve_of(lambda s, w: s, draft_s=1e-9, host_s=0)  # slots cost what they bring
    plan = best_plan(curve, (0.004, 0.002))
    assert (plan.slots, plan.draft_length) == (1, 0)  # drafts gain less than 1 %
    plan = best_plan(curve, (0.5, 0.004))
    assert (plan.slots, plan.draft_length) == (1, 1)


def test_speculation_is_left_out_where_it_does_not_pay():
    linear = curve_of(lambda s, w: s * w)
    assert best_plan(linear, survival_of([0.6] * 7)).draft_length == 0
    flat = curve_of(lambda s, w: 1.0)
    assert best_plan(flat, survival_of([0.6] * 7)).draft_length > 0


def test_a_drafter_that_was_not_measured_is_not_planned():
    curve = StepCurve((TargetPass(4, 8, 1.0),))
    plan = best_plan(curve, (0.9, 0.8))
    assert (plan.slots, plan.draft_length) == (4, 0)


def test_memory_for_fewer_slots_than_the_shape_has_rows_leaves_padding():
    curve = StepCurve((TargetPass(16, 8, 1.0),), (DrafterPass(16, 0.1),))
    assert best_plan(curve, (0.9,), most_slots=12).slots == 12


@pytest.mark.parametrize(
    "wish", [{"slots": 9}, {"draft_length": 3}, {"most_slots": 0}, {"slots": 0}]
)
def test_a_plan_that_nothing_covers_is_refused(wish):
    with pytest.raises(ValueError, match="No plan for slots"):
        best_plan(curve_of(lambda s, w: 1.0), (0.5, 0.4), **wish)


def test_the_reason_names_the_plan_its_rivals_and_the_price_of_none():
    curve = curve_of(lambda s, w: 0.25, slots=(8,), draft_s=0.05, host_s=0.2)
    assert best_plan(curve, (0.8, 0.04)).why == (
        "slots 8, draft length 2: 29.4 tokens/s expected; 1 other plan within 3 %: 8 with 1; "
        "without speculation 17.8"
    )


def test_a_reason_without_rivals_says_so():
    curve = curve_of(lambda s, w: 0.25, slots=(8,), draft_s=0.05, host_s=0.2)
    assert best_plan(curve, (0.8,)).why == (
        "slots 8, draft length 1: 28.8 tokens/s expected; no other plan within 3 %; "
        "without speculation 17.8"
    )


@pytest.mark.parametrize(("draft_s", "pays"), [(1.0, True), (6.9, True), (7.0, False)])
def test_whether_drafts_could_pay_is_whether_right_ones_would(draft_s, pays):
    curve = curve_of(lambda s, w: 1.0, slots=(4,), draft_s=draft_s, host_s=0)
    assert can_pay(curve, 4, 7) == pays  # 8 tokens in 1 + draft_s seconds, or 1 in 1
    assert not can_pay(curve, 4, 0)
    assert can_pay(curve, 5, 7)  # nobody measured it


# Verify lengths of a round


def verify_lengths_of_the_paper(second, **options):
    """One slot, so tokens and width are the same; `second` is known only with the first draft."""
    survival = [survival_of((0.8, second))]
    return verify_lengths(survival, lambda n, w: 1 / PAPER_SPS[w], **options)


@pytest.mark.parametrize("by_position", [False, True])
def test_the_early_stop_gives_the_papers_counterexample_one_answer(by_position):
    options = {"stop_early": True, "by_position": by_position}
    assert verify_lengths_of_the_paper(0.9, **options) == [0]
    assert verify_lengths_of_the_paper(0.0, **options) == [0]


@pytest.mark.parametrize("by_position", [False, True])
def test_without_the_early_stop_the_papers_counterexample_leaks(by_position):
    options = {"stop_early": False, "by_position": by_position}
    assert verify_lengths_of_the_paper(0.9, **options) == [2]
    assert verify_lengths_of_the_paper(0.0, **options) == [0]


def expected_rate(survival, seconds, lengths):
    expected = sum(1 + sum(a[:n]) for a, n in zip(survival, lengths, strict=True))
    return expected / seconds(sum(lengths) + len(lengths), 1 + max(lengths))


def naive_path(survival):
    """Every length vector on the paper's path, as Algorithm 1 visits them."""
    lengths, path = [0] * len(survival), []
    order = [(-a, k, slot) for slot, block in enumerate(survival) for k, a in enumerate(block)]
    for minus_a, k, slot in sorted(order):
        path.append(list(lengths))
        if minus_a == 0:
            return path
        lengths[slot] = k + 1
    return [*path, list(lengths)]


def random_round(seed):
    random = Random(seed)
    slots, block_size = random.randint(1, 3), random.randint(0, 3)
    survival = [random_survival(random, block_size) for _ in range(slots)]
    seconds = list(itertools.accumulate(random.choice([0, 0.2, 1.0]) for _ in range(20)))
    return survival, [1 + s for s in seconds]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_point_of_the_papers_path_is_found(seed):
    survival, table = random_round(seed)

    def seconds(num_tokens, width):
        return table[num_tokens]

    lengths = verify_lengths(survival, seconds, stop_early=False)
    rates = [expected_rate(survival, seconds, point) for point in naive_path(survival)]
    assert lengths in naive_path(survival)
    assert expected_rate(survival, seconds, lengths) == pytest.approx(max(rates))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_early_stop_is_the_papers_loop(seed):
    survival, table = random_round(seed)

    def seconds(num_tokens, width):
        return table[num_tokens]

    best, *path = naive_path(survival)
    for point in path:
        if (
            expected_rate(survival, seconds, point)
            <= expected_rate(survival, seconds, best) + 1e-12
        ):
            break
        best = point
    assert verify_lengths(survival, seconds, stop_early=True) == best


@pytest.mark.parametrize("seed", SEEDS)
def test_where_each_token_costs_the_same_no_lengths_are_better(seed):
    survival, _ = random_round(seed)

    def seconds(num_tokens, width):
        return 2 + 0.4 * num_tokens

    lengths = verify_lengths(survival, seconds, stop_early=True)
    every = itertools.product(range(len(survival[0]) + 1), repeat=len(survival))
    best = max(expected_rate(survival, seconds, point) for point in every)
    assert expected_rate(survival, seconds, lengths) == pytest.approx(best)


@pytest.mark.parametrize("seed", SEEDS)
def test_where_a_pass_costs_its_width_no_lengths_are_better(seed):
    survival, table = random_round(seed)

    def seconds(num_tokens, width):
        return table[width]

    lengths = verify_lengths(survival, seconds, stop_early=False, by_position=True)
    every = itertools.product(range(len(survival[0]) + 1), repeat=len(survival))
    best = max(expected_rate(survival, seconds, point) for point in every)
    assert expected_rate(survival, seconds, lengths) == pytest.approx(best)


def test_many_slots_pay_for_a_width_that_no_single_draft_pays_for():
    survival, seconds = [(0.5,)] * 8, lambda num_tokens, width: 1 + 0.2 * width
    assert verify_lengths(survival, seconds, stop_early=True) == [0] * 8
    assert verify_lengths(survival, seconds, stop_early=True, by_position=True) == [1] * 8


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_early_stop_does_not_look_behind_a_draft_that_it_leaves_out(seed, by_position):
    survival, table = random_round(seed)
    random = Random(seed)

    def seconds(num_tokens, width):
        return table[width if by_position else num_tokens]

    def with_another_draft(block, length):
        """The first draft that is left out, drawn anew: it changes what comes behind its own."""
        known, factor = block[: length + 1], random.choice([0, 0.5, 1])
        return known + tuple(factor * a for a in known[-1:]) * len(block[length + 1 :])

    lengths = verify_lengths(survival, seconds, stop_early=True, by_position=by_position)
    other = [with_another_draft(*pair) for pair in zip(survival, lengths, strict=True)]
    assert verify_lengths(other, seconds, stop_early=True, by_position=by_position) == lengths


def test_a_step_by_position_is_priced_with_all_its_drafts():
    asked = []

    def seconds(num_tokens, width):
        asked.append((num_tokens, width))
        return 1.0

    verify_lengths([(0.9, 0.5), (0.9, 0.0)], seconds, stop_early=False, by_position=True)
    assert asked == [(2, 1), (4, 2), (5, 3)]


@pytest.mark.parametrize("by_position", [False, True])
def test_sure_drafts_keep_their_order_and_dead_ones_stay_out(by_position):
    survival = [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.5, 0.5, 0.0)]
    free = verify_lengths(survival, lambda n, w: 1.0, stop_early=True, by_position=by_position)
    assert free == [3, 0, 2]


def test_a_step_that_changes_nothing_is_not_taken():
    survival, seconds = [(1.0, 1.0)], lambda num_tokens, width: float(num_tokens)
    assert verify_lengths(survival, seconds, stop_early=False) == [0]  # 1, 2/2, 3/3


def test_of_two_equal_drafts_the_earlier_position_is_admitted():
    seconds = {2: 1.0, 3: 1.0, 4: 9.0, 5: 9.0, 6: 9.0}
    survival = [(0.5, 0.5), (0.5, 0.5)]
    assert verify_lengths(survival, lambda n, w: seconds[n], stop_early=False) == [1, 0]
    seconds[4] = 1.0
    assert verify_lengths(survival, lambda n, w: seconds[n], stop_early=False) == [1, 1]


def test_nothing_drafted_means_nothing_verified():
    assert verify_lengths([(), ()], lambda n, w: 1.0, stop_early=True) == [0, 0]


# What is learnt


def test_before_any_round_survival_is_the_priors():
    assert Acceptance(prior=0.5).survival(3) == (0.5, 0.25, 0.125)
    assert Acceptance().survival(0) == ()


def test_acceptance_is_learnt_by_position():
    random, acceptance, conditional = Random(1), Acceptance(64), (0.9, 0.5, 0.8)
    for _ in range(5000):
        acceptance.add(accepted(random, conditional, 3), 3)
    assert acceptance.survival(3) == pytest.approx(survival_of(conditional), abs=0.06)


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


@pytest.mark.parametrize("counts", [(2, 1), (-1, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="drafts accepted: expected"):
        Acceptance().add(*counts)


# How many decode together


@pytest.mark.parametrize("seed", SEEDS)
def test_no_other_count_gives_more_tokens_per_second(seed):
    random = Random(seed)
    curve, survival = random_curve(random), random_survival(random, 5)
    most = random.randint(1, max(p.slots for p in curve.target))
    active = random.randint(0, most)
    rates = {
        count: max(naive_rate(curve, survival, count, k) or 0 for k in range(6))
        for count in range(max(1, active), most + 1)
    }
    chosen = best_count(curve, survival, active, most)
    assert rates[chosen] == pytest.approx(max(rates.values()))


def test_a_few_more_than_a_pass_holds_wait_until_the_next_pass_pays():
    curve = curve_of(lambda s, w: float(s), slots=(16, 32))
    assert [best_count(curve, (), 0, most) for most in (5, 16, 20, 31, 32)] == [5, 16, 16, 16, 32]
    assert [best_count(curve, (), 16, most) for most in (20, 32)] == [16, 32]


def test_free_rows_of_the_pass_that_runs_are_taken():
    curve = curve_of(lambda s, w: float(s), slots=(16, 32))
    assert [best_count(curve, (), 18, most) for most in (18, 21)] == [18, 21]


def test_what_nobody_measured_does_not_limit_the_count():
    assert best_count(curve_of(lambda s, w: float(s), slots=(2,)), (0.8,), 0, 5) == 5


# The pace of a run


@pytest.mark.parametrize("seed", SEEDS)
def test_a_draft_length_is_left_only_for_three_hundredths_and_then_for_the_best(seed):
    random = Random(seed)
    curve, survival = curve_of(lambda s, w: random.uniform(1, 1.2)), random_survival(random, 7)
    slots, current = random.randint(1, 8), random.randint(0, 7)
    rates = [naive_rate(curve, survival, slots, k) for k in range(8)]
    chosen = next_draft_length(curve, survival, slots, current)
    if max(rates) < 1.03 * rates[current]:
        assert chosen == current
    else:
        assert rates[chosen] == pytest.approx(max(rates))


def test_few_slots_at_the_end_of_a_job_draft_wider():
    curve = curve_of(lambda s, w: 1 + 0.05 * s * w)
    survival = survival_of([0.8] * 7)
    many, few = (next_draft_length(curve, survival, slots, 0) for slots in (8, 1))
    assert 0 < many < few


def test_a_length_that_the_rows_in_use_do_not_allow_is_left():
    curve = StepCurve((TargetPass(8, 2, 1.0), TargetPass(1, 8, 1.0)), (DrafterPass(8, 0.01),))
    assert next_draft_length(curve, (0.9, 0.8), 8, 2) == 1


def test_without_speculation_four_rounds_of_260_try_it():
    curve, survival = curve_of(lambda s, w: w), (0.1, 0.01)
    pace, lengths = Pace(2), []
    for _ in range(520):
        pace = next_pace(pace, curve, survival, 8)
        lengths.append(pace.draft_length)
    assert lengths == ([0] * 256 + [1] * 4) * 2  # 1 loses least


def test_a_trial_that_pays_goes_on():
    curve = curve_of(lambda s, w: 1 + 0.1 * w)
    pace = next_pace(Pace(1, num_plain=257), curve, survival_of([0.9] * 7), 8)
    assert pace == Pace(7)


def test_a_trial_does_not_count_as_the_length_in_use():
    curve = StepCurve((TargetPass(1, 1, 1.0), TargetPass(1, 2, 1.0)), (DrafterPass(1, 0.11),))
    survival = (0.1,)  # one draft gives 1.1 tokens for 1.11: within 3 %
    assert next_draft_length(curve, survival, 1, 1) == 1
    assert next_pace(Pace(1, num_plain=257), curve, survival, 1) == Pace(1, num_plain=258)
    assert next_pace(Pace(1, num_plain=260), curve, survival, 1) == Pace(0, num_plain=1)


def test_there_is_no_trial_without_a_drafter():
    curve = StepCurve((TargetPass(1, 8, 1.0),))
    assert next_pace(Pace(0, num_plain=256), curve, (0.9,), 1) == Pace(0, num_plain=257)


def test_without_a_pass_for_so_many_slots_nothing_is_drafted_and_nothing_is_tried():
    curve = StepCurve((TargetPass(1, 8, 1.0),), (DrafterPass(1, 1.0),))
    assert next_pace(Pace(0, num_plain=300), curve, (0.9,), 2).draft_length == 0


@pytest.mark.parametrize(("draft_s", "share"), [(0.1, 4 / 260), (3.0, 0.02), (30.0, 0.02)])
def test_trials_lose_at_most_2_percent_of_the_time(draft_s, share):
    curve, survival = curve_of(lambda s, w: 1.0, draft_s=draft_s, host_s=0.0), (0.05, 0.0)
    pace, tokens, took, trials = Pace(0), 0.0, 0.0, 0
    for _ in range(20_000):
        pace = next_pace(pace, curve, survival, 8)
        trials += pace.draft_length > 0
        tokens += 8 * accept_length(survival, 1 + pace.draft_length)
        took += seconds_of_round(curve, 8, pace.draft_length)
    assert trials >= 4
    assert took <= (1 + share) * tokens / curve.tokens_per_s(survival, 8, 0)


def test_a_trial_that_was_put_off_comes_as_soon_as_it_is_cheap():
    dear, cheap = (curve_of(lambda s, w: 1.0, draft_s=seconds) for seconds in (30.0, 0.2))
    pace = Pace(0)
    for _ in range(1000):
        pace = next_pace(pace, dear, (0.01,), 8)
    lengths = []
    for _ in range(6):
        pace = next_pace(pace, cheap, (0.01,), 8)
        lengths.append(pace.draft_length)
    assert lengths == [1, 1, 1, 1, 0, 0]


# What rounds really take


def test_before_any_round_the_curve_is_believed():
    curve, survival = curve_of(lambda s, w: s + w), survival_of([0.9] * 7)
    rates = [costs.tokens_per_s(survival, 3, 5) for costs in (curve, LiveCurve(curve))]
    assert rates[0] == rates[1]


def test_a_kind_of_round_takes_the_median_of_those_that_were_seen():
    live = LiveCurve(curve_of(lambda s, w: 1.0))
    for seconds in (2.0, 2.5, 40.0, 3.0, 2.0):
        live.add(4, 7, seconds)
    assert live.tokens_per_s([1.0] * 7, 4, 7) == pytest.approx(4 * 8 / 2.5)


@pytest.mark.parametrize("factor", [3, 0.25])
def test_of_slots_that_drafted_the_better_is_believed(factor):
    curve, survival = curve_of(lambda s, w: s + w), survival_of([0.9] * 7)
    live = LiveCurve(curve)
    for _ in range(5):
        live.add(8, 7, factor * curve.round_s(8, 7))
    for slots, draft_length in [(8, 0), (8, 6)]:
        expected = curve.tokens_per_s(survival, slots, draft_length) / min(1, factor)
        assert live.tokens_per_s(survival, slots, draft_length) == pytest.approx(expected)


@pytest.mark.parametrize("seen", [(8, 0), (8, 7)])
def test_what_other_slots_take_is_as_far_off_as_what_was_seen(seen):
    curve, survival = curve_of(lambda s, w: s + w), survival_of([0.9] * 7)
    live = LiveCurve(curve)
    for _ in range(3):
        live.add(*seen, 3 * curve.round_s(*seen))
    live.add(4, 0, curve.round_s(4, 0))  # once is not known
    plainly = [(8, 7)] * (seen[1] == 0)
    for slots, draft_length in [(4, 7), (4, 0), (1, 2), *plainly]:
        expected = curve.tokens_per_s(survival, slots, draft_length) / 3
        assert live.tokens_per_s(survival, slots, draft_length) == pytest.approx(expected)


def test_lengths_that_pad_to_one_pass_are_one_kind():
    curve = StepCurve((TargetPass(8, 8, 1.0),), (DrafterPass(8, 0.5),))
    live = LiveCurve(curve)
    for _ in range(3):
        live.add(8, 7, 3.0)
    assert live.tokens_per_s([1.0] * 7, 5, 3) == pytest.approx(5 * 4 / 3)
    assert live.tokens_per_s([1.0] * 7, 5, 0) == 5  # no drafter ran


def test_two_rounds_or_old_ones_say_nothing():
    curve, survival = curve_of(lambda s, w: 1.0), (0.9,)
    live, expected = LiveCurve(curve), curve.tokens_per_s(survival, 8, 1)
    for _ in range(2):
        live.add(8, 1, 100.0)
    assert live.tokens_per_s(survival, 8, 1) == expected
    live.add(8, 1, 100.0)
    assert live.tokens_per_s(survival, 8, 1) == pytest.approx(8 * 1.9 / 100)
    for _ in range(512):
        live.add(8, 0, curve.round_s(8, 0))
    assert live.tokens_per_s(survival, 8, 1) == expected


def test_a_round_that_was_never_measured_teaches_nothing():
    live = LiveCurve(StepCurve((TargetPass(1, 8, 1.0),)))
    for _ in range(9):
        live.add(2, 0, 5.0)
        live.add(1, 3, 5.0)  # no drafter
    assert live.tokens_per_s((), 1, 0) == 1.0


# A whole run on a machine that is only numbers


def accepted(random, conditional, draft_length):
    return next((k for k in range(draft_length) if random.random() >= conditional[k]), draft_length)


def seconds_of_round(curve, slots, draft_length):
    draft_s = curve.draft_s(slots) if draft_length else 0
    return draft_s + curve.verify_s(slots, 1 + draft_length) + curve.host_s


def seconds_of_run(curve, phases, slots, rounds, random, probed=None):
    """Return what the policy took, and what the best fixed length of each phase takes for it."""
    acceptance, pace, took, best = Acceptance(slots), Pace(7), 0.0, 0.0
    live = LiveCurve(probed or curve)
    for conditional in phases:
        num_tokens = 0
        for _ in range(rounds):
            pace = next_pace(pace, live, acceptance.survival(7), slots)
            seconds = random.uniform(0.9, 1.1) * seconds_of_round(curve, slots, pace.draft_length)
            live.add(slots, pace.draft_length, seconds)
            took += seconds
            for _ in range(slots):
                stay = accepted(random, conditional, pace.draft_length)
                acceptance.add(stay, pace.draft_length)
                num_tokens += stay + 1
        survival = survival_of(conditional)
        best += num_tokens / max(naive_rate(curve, survival, slots, k) for k in range(8))
    return took, best


GOOD, FAIR, BAD = [0.9] * 7, [0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5], [0.2] * 7
CLIFF = [0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1]
MACHINES = {
    "width is nearly free": lambda s, w: 1 + 0.01 * s * w / 8,
    "width costs": lambda s, w: 0.6 + 0.4 * w,
    "one price for all widths": lambda s, w: 1.0 if w == 1 else 1.8,
    "a step at 4": lambda s, w: 1.0 if w <= 4 else 2.0,
}


@pytest.mark.parametrize("phases", [(GOOD, BAD), (BAD, GOOD), (FAIR, CLIFF), (CLIFF, GOOD)])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_run_takes_at_most_5_percent_longer_than_the_best_lengths(phases, machine):
    curve = curve_of(MACHINES[machine], slots=(8,), draft_s=0.3)
    took, best = seconds_of_run(curve, phases, 8, 1200, Random(7))
    assert took <= 1.05 * best


@pytest.mark.parametrize(("slots", "rounds"), [(1, 6000), (32, 500)])
def test_so_does_a_run_of_few_or_many_slots(slots, rounds):
    curve = curve_of(MACHINES["width costs"], slots=(slots,), draft_s=0.3)
    took, best = seconds_of_run(curve, (FAIR, BAD), slots, rounds, Random(7))
    assert took <= 1.05 * best


WRONG_PROBES = {
    "all passes look four times as slow": lambda seconds, s, w: 4 * seconds,
    "all passes look four times as fast": lambda seconds, s, w: seconds / 4,
    "drafting looks free": lambda seconds, s, w: 1.0,
}


@pytest.mark.parametrize("wrong", WRONG_PROBES)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_probe_that_was_wrong_is_corrected_by_the_rounds(machine, wrong):
    seconds = MACHINES[machine]
    curve = curve_of(seconds, slots=(8,), draft_s=0.3)
    probed = curve_of(lambda s, w: WRONG_PROBES[wrong](seconds(s, w), s, w), (8,), draft_s=0.3)
    took, best = seconds_of_run(curve, (FAIR, BAD), 8, 1200, Random(7), probed)
    assert took <= 1.05 * best


@pytest.mark.parametrize(("conditional", "share"), [(GOOD, 1.02), (BAD, 1.1)])
def test_a_short_job_drafts_from_the_start_where_a_very_good_pair_would_gain(conditional, share):
    curve = curve_of(lambda s, w: 1 + w / 4, slots=(4,), draft_s=2.5)
    assert naive_rate(curve, survival_of([0.8] * 7), 4, 7) < naive_rate(curve, (), 4, 0)
    runs = [seconds_of_run(curve, [conditional], 4, 60, Random(seed)) for seed in range(9)]
    assert sum(took for took, _ in runs) <= share * sum(best for _, best in runs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("machine", MACHINES)
def test_where_others_take_the_machine_at_times_little_is_lost(machine, seed):
    random, pace, acceptance = Random(seed), Pace(7), Acceptance(8)
    curve = curve_of(MACHINES[machine], slots=(8,), draft_s=0.3)
    live, took, num_tokens = LiveCurve(curve), 0.0, 0
    for _ in range(60):
        slowdown = random.choice([1, 1, 3])
        for _ in range(random.randint(3, 60)):
            pace = next_pace(pace, live, acceptance.survival(7), 8)
            seconds = seconds_of_round(curve, 8, pace.draft_length)
            live.add(8, pace.draft_length, slowdown * random.uniform(0.9, 1.1) * seconds)
            took += seconds
            for _ in range(8):
                stay = accepted(random, FAIR, pace.draft_length)
                acceptance.add(stay, pace.draft_length)
                num_tokens += stay + 1
    best = max(naive_rate(curve, survival_of(FAIR), 8, k) for k in range(8))
    assert took <= 1.15 * num_tokens / best


def test_the_same_rounds_give_the_same_paces():
    curve = curve_of(MACHINES["width costs"], slots=(4,))
    runs = [seconds_of_run(curve, (GOOD, BAD), 4, 300, Random(3)) for _ in range(2)]
    assert runs[0] == runs[1]
