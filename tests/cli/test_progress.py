"""Progress says what a person wants to know, and never breaks a run."""

import io
import json
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from dspark_batch.cli.bar import Bar
from dspark_batch.cli.draining import Draining
from dspark_batch.cli.first_rows import FirstRows
from dspark_batch.cli.progress import JsonLines, Lines
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Gauge, Item

ITEM = Item(0, "0", "00", "in.jsonl:1")


@pytest.fixture
def log():
    return io.StringIO()


@pytest.fixture
def lines(log, clock):
    return Lines(log, clock)


def test_a_log_gets_a_line_per_stage_and_one_at_the_end(lines, log, make_tick, answer):
    with lines as observe:
        observe(make_tick("load", total=2))
        observe(tick := make_tick(total=2))
        observe(tick := tick.after(answer))
        observe(tick := tick.after(answer))
        observe(replace(tick, stage="finish", outcome=None))
    assert log.getvalue().splitlines() == [
        "dspark-batch: loading the models",
        "dspark-batch: decoding",
        "dspark-batch: writing the output",
        "dspark-batch: 2/2 items, accept length 3.00",
    ]


def test_a_log_gets_one_line_every_30_s(lines, log, clock, make_tick, answer):
    with lines as observe:
        observe(tick := make_tick(total=1000))
        for _ in range(300):
            clock.now += 1
            observe(tick := tick.after(answer))
    assert len(log.getvalue().splitlines()) == 1 + 10 + 1  # decoding, 300 s, the end


def test_a_log_is_told_of_a_download_every_30_s(lines, log, clock, make_tick):
    tick = make_tick("load")
    doing = replace(tick, doing="downloading org/name, 1.00 of 8.00 GB")
    with lines as observe:
        observe(tick)
        observe(doing)
        clock.now += 30
        observe(doing)
    assert log.getvalue().splitlines()[:2] == [
        "dspark-batch: loading the models",
        "dspark-batch: downloading org/name, 1.00 of 8.00 GB",
    ]


def test_a_log_is_told_at_once_that_the_machine_is_measured(lines, log, make_tick):
    with lines as observe:
        observe(tick := make_tick("load"))
        observe(replace(tick, doing="downloading org/name, 8.00 of 8.00 GB"))
        observe(replace(tick, doing="measuring this machine (once)"))
        observe(replace(tick, doing="measuring this machine (once)"))
    assert log.getvalue().splitlines()[:-1] == [
        "dspark-batch: loading the models",
        "dspark-batch: measuring this machine (once)",
    ]


def test_a_line_says_how_far_how_fast_and_what_failed(
    lines, log, clock, make_tick, answer, failure
):
    with lines as observe:
        observe(tick := make_tick(total=1200, done=200, resumed=200))
        clock.now += 40
        observe(tick := tick.after(failure))
        clock.now += 60
        observe(tick := tick.after(answer))
    assert log.getvalue().splitlines()[-1] == (
        "dspark-batch: 202/1,200 items, 13 h 51 min left, 0.10 tokens/s now, 0.10 mean, "
        "accept length 3.00, 1 failed, 200 resumed"
    )


def test_a_log_whose_reader_is_gone_does_not_stop_the_run(clock, make_tick):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with Lines(Gone(), clock) as observe:
        observe(make_tick())


@pytest.fixture
def screen():
    """A terminal of 80 columns, as text."""
    return Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)


def test_the_bar_fits_a_terminal_of_80_columns(screen, clock, make_tick, answer):
    with Bar(screen, clock) as observe:
        observe(make_tick("load"))
        observe(tick := make_tick(total=123_456, done=98_764, failed=321, resumed=8_764))
        clock.now += 1
        observe(replace(tick.after(answer), done=98_765, new_tokens=1234))
        lines = screen.render_lines(observe._frame(), pad=False)
    bar, speeds = ("".join(segment.text for segment in line) for line in lines)
    assert bar.endswith("98,765/123,456 items, 0.3 s left")
    assert speeds == (
        "1,234 tokens/s now, 1,234 mean · accept length 3.00 · 321 failed · 8,764 resumed"
    )


def test_the_spinner_tells_how_far_a_download_is(screen, clock, make_tick):
    with Bar(screen, clock) as observe:
        observe(replace(make_tick("load"), doing="downloading org/name, 1.00 of 8.00 GB"))
        (line,) = screen.render_lines(observe._frame(), pad=False)
    assert "".join(part.text for part in line).endswith("downloading org/name, 1.00 of 8.00 GB")


ERASE_LINE = "\x1b[2K"


def test_a_bar_of_a_stopped_run_stays_on_the_screen(screen, make_tick):
    bar = Bar(screen)
    bar.__enter__()
    bar(make_tick(total=9, done=4))
    bar.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ERASE_LINE not in screen.file.getvalue().rpartition("4/9 items")[2]


def test_a_bar_of_a_finished_run_makes_room_for_the_summary(screen, make_tick):
    with Bar(screen) as observe:
        observe(make_tick(total=9, done=9))
    assert ERASE_LINE in screen.file.getvalue().rpartition("9/9 items")[2]


def test_the_bar_says_that_the_run_is_stopping(screen, make_tick):
    said = [""]
    with Bar(screen, notice=lambda: said[0]) as observe:
        observe(make_tick(total=9, done=4))
        assert len(screen.render_lines(observe._frame(), pad=False)) == 1
        said[0] = "stopping"
        *_, last = screen.render_lines(observe._frame(), pad=False)
    assert "".join(segment.text for segment in last) == "stopping"


def test_a_live_display_says_what_a_signal_does_and_nothing_is_written_beside_it(capfd):
    draining = Draining(30, is_shown=True)
    draining(is_worth_it=True)
    assert draining.notice() == ""
    with draining:
        draining._handle(signal.SIGINT, None)
        assert draining.notice().startswith("stopping: what is in flight has 30 s to finish")
    assert capfd.readouterr().err == ""


GAUGE = Gauge(3.96, 4, 8_400_000_000, 9_120_000_000, 1.5, 2.5)


def test_the_bar_says_that_answers_are_compared_and_no_longer(screen, make_tick, answer):
    tick = make_tick(total=2)
    compares = replace(tick, doing="comparing with plain decoding")
    with Bar(screen) as observe:
        observe(compares)
        observe(compares)
        screen.print(observe._frame())
        observe(tick.after(answer))
        screen.print(observe._frame())
    before, after = screen.file.getvalue().split("1/2 items", 1)
    assert "comparing with plain decoding" in before
    assert "comparing" not in after


def test_a_log_tells_of_a_comparison_only_when_it_takes_long(lines, log, clock, make_tick, answer):
    with lines as observe:
        observe(tick := make_tick(total=9))
        for _ in range(3):
            observe(replace(tick, doing="comparing with plain decoding"))
            observe(tick := tick.after(answer))
        clock.now += 30
        observe(replace(tick, outcome=None, doing="comparing with plain decoding"))
    _, told, last = log.getvalue().splitlines()
    assert told.startswith("dspark-batch: 3/9 items, ")
    assert told.endswith(", comparing with plain decoding")
    assert last.startswith("dspark-batch: 3/9 items")


def test_the_bar_says_how_full_the_engine_is(screen, clock, make_tick, answer):
    with Bar(screen, clock) as observe:
        observe(tick := make_tick(total=9))
        clock.now += 1
        observe(tick.after(answer, GAUGE))
        lines = screen.render_lines(observe._frame(), pad=False)
    assert "".join(segment.text for segment in lines[-1]) == (
        "4.0 of 4 slots busy · 8.4 GB of memory, 9.1 GB at most"
    )


def test_the_bar_says_how_much_of_the_prompts_was_there_already(screen, clock, make_tick, answer):
    with Bar(screen, clock) as observe:
        observe(tick := make_tick(total=9))
        observe(tick.after(answer._replace(prompt_tokens=80, cached_tokens=56), GAUGE))
        lines = screen.render_lines(observe._frame(), pad=False)
    assert "4.0 of 4 slots busy · 70% prefix hits" in "".join(part.text for part in lines[-1])


def objects_of(log):
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_a_program_gets_an_object_per_stage_one_a_second_and_the_last(
    log, clock, make_tick, answer
):
    with JsonLines(log, clock) as observe:
        observe(make_tick("load", total=20))
        observe(tick := make_tick(total=20))
        for _ in range(20):
            clock.now += 0.25
            observe(tick := tick.after(answer, GAUGE))
        observe(replace(tick, stage="finish", outcome=None))
    found = objects_of(log)
    assert [each["stage"] for each in found] == ["load", *["decode"] * 6, "finish", "finish"]
    assert [each["done"] for each in found] == [0, 0, 4, 8, 12, 16, 20, 20, 20]


def test_an_object_has_every_number_of_the_view(log, clock, make_tick, answer, failure):
    with JsonLines(log, clock) as observe:
        observe(tick := make_tick(total=12, done=2, resumed=2))
        clock.now += 5
        observe(tick := tick.after(failure))
        clock.now += 5
        observe(tick.after(answer, GAUGE))
    first, *_, last = objects_of(log)
    assert first["remaining_s"] is first["accept_length"] is first["memory_bytes"] is None
    assert last == {
        "stage": "decode",
        "doing": None,
        "total": 12,
        "done": 4,
        "failed": 1,
        "resumed": 2,
        "new_tokens": 10,
        "tokens_per_s": 1.0,
        "recent_tokens_per_s": 1.0,
        "accept_length": 3.0,
        "elapsed_s": 10.0,
        "remaining_s": 40.0,
        "busy_slots": 3.96,
        "slots": 4,
        "prefix_hits": 0.0,
        "memory_bytes": 8_400_000_000,
        "workers": None,
    }


def test_objects_whose_reader_is_gone_do_not_stop_the_run(clock, make_tick):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with JsonLines(Gone(), clock) as observe:
        observe(make_tick())


# The first rows


def test_the_first_rows_are_shown_as_they_finish(log, clock, make_tick, answer, failure):
    rows = FirstRows(2, Spec(inputs=("in.jsonl",), out="o.jsonl"))
    asked = answer._replace(item=ITEM._replace(custom_id="a", record={"prompt": "What\nis it?"}))
    with Lines(log, clock, rows) as observe:
        observe(tick := make_tick(total=3))
        for outcome in (asked._replace(text="x" * 99), failure, answer):
            observe(tick := tick.after(outcome))
    assert log.getvalue().splitlines()[1:3] == [
        f"dspark-batch: a: What is it? -> {'x' * 59}…",
        "dspark-batch: 0:  -> in.jsonl:1: not JSON",
    ]
    assert len(log.getvalue().splitlines()) == 4  # decoding, two rows, the end


def test_the_bar_shows_rows_above_itself(make_tick, answer, clock):
    stream = io.StringIO()
    console = Console(file=stream, width=60, force_terminal=True)
    with Bar(console, clock, rows=FirstRows(1, Spec(inputs=("i",), out="o.jsonl"))) as observe:
        observe(make_tick(total=2).after(answer))
    assert "0:  -> answer" in stream.getvalue()
