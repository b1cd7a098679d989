"""Numbers and texts read the same wherever they stand."""

import pytest

from dspark_batch.cli.wording import duration, one_line, speed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.99, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (390, "6 min 30 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (100 * 3600, "100 h 0 min"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(0, "0.00"), (0.42, "0.42"), (4.2, "4.2"), (42.4, "42"), (4200, "4,200")],
)
def test_a_speed_has_the_digits_that_matter(per_second, text):
    assert speed(per_second) == text


def test_text_on_one_line_holds_nothing_that_moves_the_cursor():
    assert one_line("a\r\n b\x1b[2J\t c\u2028d\x00") == "a b [2J c d"
