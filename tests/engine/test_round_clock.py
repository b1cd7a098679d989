"""The clock's account of a round, in made-up seconds."""

from dataclasses import replace

import mlx.core as mx
import pytest
from golden_cases import GREEDY_RUNS, load_case

from dspark_batch.engine import clock as clock_module
from dspark_batch.engine.clock import Clock
from dspark_batch.engine.engine import Engine
from dspark_batch.types import Item, Request


class Time:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def after(self, seconds, call):
        """Make the call take so long."""

        def slow(*args, **options):
            self.seconds += seconds
            return call(*args, **options)

        return slow


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def clock(time):
    return Clock(time)


@pytest.fixture
def every_round(monkeypatch):
    """Sample all rounds that may be."""
    monkeypatch.setattr(clock_module, "_FIRST_SAMPLE", 1)
    monkeypatch.setattr(clock_module, "_SAMPLE_EVERY", 1)


def one_round(clock, time, *, parts=(3.0, 5.0, 2.0), prompts=False):
    """Go through a round whose parts the host waits for, or prepares, for so many seconds."""
    clock.begin()
    if prompts:
        clock.add_prompts()
    clock.begin_parts()
    for part, is_over in zip(parts, (clock.drafted, clock.verified, clock.drafted), strict=True):
        time.seconds += part
        is_over()
    clock.launch(1)
    time.seconds += 1.0  # until the device is ready
    clock.end()


def sampled(clock, time, rounds, **options):
    """Go through some rounds; return the numbers of those that were samples."""
    numbers = []
    for _ in range(rounds):
        before = clock.verify_s
        one_round(clock, time, **options)
        if clock.verify_s > before:
            numbers.append(clock.rounds)
    return numbers


def test_samples_become_rare_and_do_not_end(clock, time):
    expected = [17, 33, 65, 129, 257, 513, 1025, 2049, 3073, 4097]
    assert sampled(clock, time, 5000) == expected
    assert clock.sampled_rounds == len(expected)


def test_a_round_with_prompts_is_no_sample_the_next_one_is(clock, time):
    assert sampled(clock, time, 30, prompts=True) == []
    assert sampled(clock, time, 70) == [31, 61]


@pytest.mark.usefixtures("every_round")
def test_drafting_and_extending_the_context_are_one_part_and_the_target_is_the_other():
    time = Time()
    clock = Clock(time)
    one_round(clock, time)
    assert (clock.draft_s, clock.verify_s) == (0, 0)
    one_round(clock, time)
    assert (clock.draft_s, clock.verify_s) == (5, 5)
    assert clock.round_s == 22


@pytest.mark.usefixtures("every_round")
def test_waiting_for_a_part_is_no_idle_device(time, monkeypatch):
    monkeypatch.setattr(clock_module.mx, "eval", time.after(10.0, mx.eval))
    clock = Clock(time)
    one_round(clock, time)
    assert clock.idle_s == 10  # what the host prepared
    one_round(clock, time)
    assert clock.idle_s == 20
    assert clock.round_s == 11 + 11 + 4 * 10


def test_a_sample_is_not_what_a_round_usually_takes(time, monkeypatch):
    monkeypatch.setattr(clock_module, "_FIRST_SAMPLE", 1)
    clock = Clock(time)
    one_round(clock, time)
    one_round(clock, time, parts=(30.0, 50.0, 20.0))
    assert (clock.round_s, clock.prefill_s) == (11 + 101, 0)
    one_round(clock, time, parts=(7.0, 5.0, 2.0), prompts=True)
    assert (clock.round_s, clock.prefill_s) == (11 + 101 + 11, 4)


def test_an_audit_between_two_answers_is_no_time_of_the_engine(time):
    case = load_case("qwen3_vanilla")
    engine = Engine(case.pair, slots=2)
    engine._clock = Clock(time)
    for _ in engine.generate(requests(case)):
        time.seconds += 100.0
        engine.leave_out(100.0)
    gauge = engine.gauge()
    assert (gauge.round_s, gauge.prefill_s, gauge.idle_s) == (0, 0, 0)


def requests(case):
    return [
        Request(Item(n, str(n), f"digest-{n}", f"test:{n}"), case.prompt(run), 20 + n)
        for n, run in enumerate(GREEDY_RUNS)
    ]


def test_sampling_changes_no_answer(every_round, monkeypatch):
    case = load_case("qwen3_vanilla")
    stepwise = Engine(case.pair, slots=2)
    answers = {a.item.index: a for a in stepwise.generate(requests(case))}
    assert stepwise.gauge().sampled_verify_s > 0
    monkeypatch.setattr(clock_module, "_FIRST_SAMPLE", 1000)
    queued = Engine(case.pair, slots=2)
    for expected in queued.generate(requests(case)):
        answer = answers[expected.item.index]
        assert answer.token_ids == expected.token_ids
        assert answer.accept_lengths == expected.accept_lengths
    assert queued.gauge().sampled_verify_s == 0


@pytest.mark.usefixtures("every_round")
@pytest.mark.parametrize(
    ("name", "expected"), [("propose", (1, 0)), ("verify", (0, 1)), ("extend", (1, 0))]
)
def test_each_pass_of_the_engine_is_on_its_side(name, expected, time):
    case = load_case("qwen3_vanilla")
    engine = Engine(case.pair)
    engine._clock = Clock(time)
    setattr(engine._passes, name, time.after(1.0, getattr(engine._passes, name)))
    (answer,) = engine.generate(requests(case)[:1])
    samples = len(answer.accept_lengths) - 1
    gauge = engine.gauge()
    assert (gauge.sampled_draft_s, gauge.sampled_verify_s) == tuple(n * samples for n in expected)


def test_a_sample_waits_for_what_was_queued_and_nothing_else_does(time, monkeypatch):
    monkeypatch.setattr(clock_module, "_FIRST_SAMPLE", 6)
    case = load_case("qwen3_vanilla")
    list(Engine(case.pair, draft_length=1).generate(requests(case)[:1]))  # finds safe rows
    monkeypatch.setattr(mx, "eval", time.after(1.0, mx.eval))
    (answer,) = Engine(case.pair, draft_length=1).generate(requests(case)[:1])
    # One for each round; in the sample one before the parts, and one behind each of the three.
    assert time.seconds == len(answer.accept_lengths) + 4


@pytest.mark.usefixtures("every_round")
def test_the_parts_of_real_rounds_make_up_the_rounds():
    case = load_case("qwen3_vanilla")
    engine = Engine(case.pair, draft_length=2)
    list(engine.generate(requests(case)))
    gauge = engine.gauge()
    parts_s = gauge.sampled_draft_s + gauge.sampled_verify_s
    assert 0.5 * gauge.round_s < parts_s < gauge.round_s
    assert gauge.draft_s + gauge.verify_s == pytest.approx(gauge.round_s)
    assert gauge.draft_s / gauge.verify_s == pytest.approx(
        gauge.sampled_draft_s / gauge.sampled_verify_s
    )


def test_with_two_samples_nobody_knows_the_parts(monkeypatch):
    monkeypatch.setattr(clock_module, "_FIRST_SAMPLE", 1)
    case = load_case("qwen3_vanilla")
    engine = Engine(case.pair)
    list(engine.generate([requests(case)[0]]))
    gauge = engine.gauge()
    assert gauge.sampled_rounds == 2
    assert gauge.round_s > 0
    assert (gauge.draft_s, gauge.verify_s) == (None, None)


@pytest.mark.parametrize(("round_s", "idle_s"), [(0.0, 3.0 + 5.0), (0.5, 3.0)])
def test_behind_a_round_that_was_over_early_the_device_may_have_been_idle(time, round_s, idle_s):
    clock = Clock(time)
    clock.begin()
    time.seconds += 3.0  # the host prepares
    clock.launch(1)
    time.seconds += 5.0  # the host has other work, while the device runs
    clock.ask()
    time.seconds += round_s
    clock.end()
    assert clock.idle_s == idle_s
    time.seconds += 1.0  # the host commits, and prepares
    clock.launch(1)
    assert clock.idle_s == idle_s + 1.0


def test_while_the_device_makes_drafts_ahead_it_is_not_idle(every_round, clock, time):
    one_round(clock, time)
    one_round(clock, time)  # a sample: the drafter's parts take 3 and 2 seconds
    assert (clock.sampled_rounds, clock.draft_s) == (1, 5.0)
    for takes, idle_s in ((7.0, 2.0), (4.0, 0.0)):
        before = clock.idle_s
        clock.send_drafts()
        clock.begin()
        time.seconds += takes
        clock.launch(1)
        assert clock.idle_s - before == idle_s


def test_it_is_not_idle_either_while_it_makes_them_and_the_host_prepares_the_rest(
    every_round, clock, time
):
    one_round(clock, time)
    one_round(clock, time)
    before = clock.idle_s
    clock.begin()
    time.seconds += 1.0
    clock.send_drafts()
    time.seconds += 6.0  # the drafter takes 5
    clock.launch(1)
    assert clock.idle_s - before == 2.0


def test_a_round_behind_another_one_counts_as_late_only_if_that_one_was_over(time):
    clock = Clock(time)
    clock.begin()
    time.seconds += 1.0
    clock.launch(1)
    time.seconds += 1.0
    clock.launch(1)  # nobody has read the first
    assert clock.idle_s == 1.0
    clock.ask()
    time.seconds += 3.0
    assert clock.end() is None  # the first one of all
    clock.add_prompts()
    time.seconds += 2.0
    clock.launch(1)
    clock.ask()
    assert clock.end() == 2.0  # its prompts go along with the third
    assert clock.idle_s == 3.0  # the second was over, at worst since the first was
    time.seconds += 4.0
    clock.ask()
    time.seconds += 0.5
    assert clock.end() is None
    assert (clock.round_s, clock.prefill_s) == (5.0 + 2.0 + 2.0, 2.5)


def test_a_round_takes_from_the_end_of_the_one_before_to_its_own(clock, time):
    def ends_after(pause, **options):
        time.seconds += pause
        if options.get("prompts"):
            clock.add_prompts()
        clock.begin_parts()
        clock.launch(1)
        time.seconds += 1.0
        return clock.end()

    assert ends_after(5.0) is None  # none came before
    assert ends_after(0.25) == 1.25
    assert ends_after(0.25, prompts=True) is None
    assert ends_after(0.5) == 1.5
    clock.leave_out(10.0)
    assert ends_after(10.0) == 1.0
    clock.begin()
    clock.wait()
    assert ends_after(0.25) is None  # the device had a pause


def test_a_sample_does_not_tell_what_a_round_takes(clock, time):
    taken = []
    for _ in range(40):
        clock.begin_parts()
        clock.launch(1)
        taken.append(clock.end())
    assert [number for number, seconds in enumerate(taken, 1) if seconds is None] == [1, 17, 33]


def test_nor_does_a_round_in_whose_time_products_are_tested(clock, time, monkeypatch):
    """A round of a new shape may test them for longer than it takes."""
    known = {}
    monkeypatch.setattr(clock_module, "VERDICTS", known)
    taken = []
    for number in range(6):
        if number in (2, 4):
            known[number] = False
            time.seconds += 9.0
        clock.launch(1)
        time.seconds += 1.0
        taken.append(clock.end())
    assert taken == [None, 1.0, None, 1.0, None, 1.0]


def dear_drafts(case, time, **settings):
    """An engine whose drafter takes ten times as long as the rule says, more than it saves."""
    engine = Engine(case.pair, lengths=(0, 7), costs=(1.0, 0.0, 5.0, 0.0), **settings)
    engine._clock = Clock(time)
    engine._passes.verify = time.after(1.0, engine._passes.verify)
    engine._passes.propose = time.after(50.0, engine._passes.propose)
    return engine


@pytest.mark.parametrize("ahead", [False, True])
def test_drafts_that_take_longer_than_the_rule_says_are_given_up(time, ahead):
    case = load_case("qwen3_vanilla")
    engine = dear_drafts(case, time, slots=2, drafts_ahead=ahead)
    verify = engine._passes.verify

    def as_paced(cache, tokens, verify_len, num_drafts, *more):
        assert num_drafts == engine._step.draft_length
        return verify(cache, tokens, verify_len, num_drafts, *more)

    engine._passes.verify = as_paced
    long = [replace(request, max_tokens=90) for request in requests(case)[:2]]
    drafted = [count for answer in engine.generate(long) for count in answer.num_drafted]
    assert 6 <= sum(count > 0 for count in drafted) <= 24 < len(drafted)


def test_a_drafter_that_rests_is_asked_for_nothing(time):
    case = load_case("qwen3_vanilla")
    engine = dear_drafts(case, time, drafts_ahead=False)
    extended, extend = [], engine._passes.extend
    engine._passes.extend = lambda *given: extended.append(time()) or extend(*given)
    request = replace(requests(case)[0], max_tokens=90)
    (answer,) = engine.generate([request])
    (plain,) = Engine(case.pair, draft_length=0).generate([request])
    assert answer.token_ids == plain.token_ids
    assert not engine._step.keeps_context
    assert len(extended) <= 24 < len(answer.accept_lengths)
