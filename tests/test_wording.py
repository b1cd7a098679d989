"""Numbers and texts read the same wherever they stand."""

import pytest

from dspark_batch.wording import duration, one_line, parameters, size, speed, table


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


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(2_048, "2 kB"), (17_000_000, "17 MB"), (9_276e6, "9.3 GB"), (33.26e9, "33 GB")],
)
def test_a_size_has_the_digits_that_matter(num_bytes, text):
    assert size(num_bytes) == text


def test_parameters_are_counted_in_millions_and_billions():
    assert [parameters(n) for n in (6_394_688, 4_022_468_096)] == ["6.4 M", "4.0 B"]


def test_a_table_lines_up_its_columns_without_trailing_spaces():
    assert table(("a", "bb"), [("long", "x"), ("", "y")]) == "a     bb\nlong  x\n      y"
