"""Which items are audited: drawn by what an item is, so that no resume draws others."""

import json
import re
from hashlib import sha256

from dspark_batch.types import Item

ALL = "all"
_PERCENT = re.compile(r"(\d+(?:\.\d+)?) *%")
_DIGITS = 13  # hex digits, 52 bits: as many as a float holds


def share_of(asked: str | float | bool | None) -> float:
    """Read a share of the items, in 0..1.

    Args:
        asked: True or "all", "1%", 0.01 or "0.01"; None or False: none.

    Raises:
        ValueError: it is something else.
    """
    if asked is None or isinstance(asked, bool):
        return 1.0 if asked else 0.0
    if asked == ALL:
        return 1.0
    percent = _PERCENT.fullmatch(str(asked).strip())
    share = float(percent[1]) / 100 if percent else float(asked)
    if not 0 < share <= 1:
        raise ValueError(f"{asked} is not in 0% to 100%")
    return share


def draw(item: Item) -> float:
    """Draw a number in [0, 1) for an item; lengths, prefixes and slots have no part in it."""
    identity = json.dumps([item.custom_id, item.sample_index, item.digest])
    return int(sha256(identity.encode()).hexdigest()[:_DIGITS], 16) / 16**_DIGITS


def is_in_share(item: Item, share: float) -> bool:
    """Whether an item belongs to a share of all; a larger share holds the items of a smaller."""
    return draw(item) < share
