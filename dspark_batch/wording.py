"""How numbers and texts read: one form of each kind, wherever the command line shows one."""

from collections.abc import Sequence


def count(number: int) -> str:
    """Write 12345 as 12,345."""
    return f"{number:,}"


def speed(per_second: float) -> str:
    """Write a rate with the digits that matter: 0.42, 4.2, 42, 4,200."""
    if per_second >= 10:
        return f"{per_second:,.0f}"
    return f"{per_second:.1f}" if per_second >= 1 else f"{per_second:.2f}"


def duration(seconds: float) -> str:
    """Write a time in at most two units: 0.4 s, 42 s, 6 min 30 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_rest = divmod(minutes, 60)
    return f"{hours} h {minutes_rest} min" if hours else f"{minutes} min {rest} s"


def one_line(text: str) -> str:
    """Make text safe for one line of a terminal: no line breaks, no control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def lines(text: str) -> str:
    """Make text safe for a terminal, with its line breaks: no control characters."""
    return "\n".join(
        "".join(c if c.isprintable() or c == "\t" else " " for c in line)
        for line in text.splitlines()
    )


def size(num_bytes: int) -> str:
    """Write bytes in steps of 1000: 17 MB, 9.3 GB."""
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= one:
            number = num_bytes / one
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def parameters(number: int) -> str:
    """Write how many parameters a model has: 6.4 M, 4.0 B."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Line up short cells in columns, two spaces between them."""
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)
