"""What a person probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str:
    """Say `; did you mean X` with the known word that is most like this one; "" if none is."""
    by_lower = {each.lower(): each for each in known}
    found = get_close_matches(word.lower().replace("-", "_"), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[found[0]]}" if found else ""
