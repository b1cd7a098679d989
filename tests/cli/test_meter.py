"""The meter's numbers are those that a person with a stopwatch would get."""

import pytest

from dspark_batch.cli.meter import Meter


@pytest.fixture
def meter(clock):
    return Meter(clock)


def test_knows_nothing_before_anything_has_happened(meter):
    assert meter.tokens_per_s == meter.recent_tokens_per_s == 0
    assert meter.accept_length is None
    assert meter.remaining_s is None


def test_speed_is_tokens_over_the_time_since_decoding_began(meter, clock, make_tick, answer):
    meter.add(make_tick("load"))
    clock.now += 60  # loading is not decoding
    meter.add(make_tick())
    clock.now += 4
    meter.add(make_tick().after(answer))
    assert meter.tokens_per_s == meter.recent_tokens_per_s == 10 / 4
    assert meter.accept_length == 3


def test_resumed_rows_are_no_speed(meter, clock, make_tick, answer):
    tick = make_tick(total=100, done=50, resumed=50)
    meter.add(tick)
    assert meter.remaining_s is None  # no item has shown the pace yet
    clock.now += 10
    meter.add(tick.after(answer))
    assert meter.tokens_per_s == 1
    assert meter.remaining_s == 49 * 10


def test_a_failure_is_an_item_done_but_no_token(meter, clock, make_tick, failure):
    meter.add(make_tick())
    clock.now += 1
    meter.add(make_tick().after(failure))
    assert meter.remaining_s == 999
    assert meter.tokens_per_s == meter.recent_tokens_per_s == 0
    assert meter.accept_length is None


def test_prefix_hits_are_those_of_all_turns(meter, make_tick, answer):
    meter.add(tick := make_tick())
    assert meter.prefix_hits is None
    first = answer._replace(prompt_tokens=10, cached_tokens=0)
    meter.add(tick.after(answer._replace(prompt_tokens=30, cached_tokens=8, earlier=(first,))))
    assert meter.prefix_hits == 8 / 40


def test_the_recent_speed_forgets_the_start(meter, clock, make_tick, answer):
    meter.add(tick := make_tick())
    for pause in [10] * 50 + [1] * 50:  # 1 token/s, then 10
        clock.now += pause
        meter.add(tick := tick.after(answer))
    assert meter.recent_tokens_per_s == pytest.approx(10)
    assert meter.tokens_per_s == pytest.approx(1000 / 550)


def test_the_recent_speed_is_steady_when_rows_come_in_bursts(meter, clock, make_tick, answer):
    meter.add(tick := make_tick())
    seen = []
    for _ in range(20):
        clock.now += 8
        for _ in range(8):  # all slots end together: 80 tokens in 8 s
            meter.add(tick := tick.after(answer))
        seen.append(meter.recent_tokens_per_s)
    assert seen == pytest.approx([10] * 20)


def test_a_row_in_the_first_second_counts(meter, clock, make_tick, answer):
    meter.add(make_tick())
    clock.now += 0.5
    meter.add(make_tick().after(answer))
    assert meter.recent_tokens_per_s == meter.tokens_per_s == 20


def test_the_recent_speed_sinks_while_nothing_ends(meter, clock, make_tick, answer):
    meter.add(make_tick())
    clock.now += 1
    meter.add(make_tick().after(answer))
    clock.now += 99
    assert meter.recent_tokens_per_s == pytest.approx(0.1)


def test_the_meter_keeps_little_however_long_the_run(meter, clock, make_tick, answer):
    meter.add(tick := make_tick())
    for _ in range(3000):
        clock.now += 0.1
        meter.add(tick := tick.after(answer))
    assert len(meter._recent) < 40
