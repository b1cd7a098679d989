"""How numbers and texts read: one form of each kind, wherever the command line shows one."""


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
