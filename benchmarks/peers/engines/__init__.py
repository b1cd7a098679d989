"""One file an engine: `load(target, drafter, stop_ids)` returns what answers prompts.

That is a function of prompts (lists of token ids), max_tokens and the engine's settings. It returns
the ids of each answer, the stop id included, and keeps nothing from one call to the next.
"""

from itertools import takewhile


def beginning(prompts):
    """Return the ids that all prompts begin with."""
    first, last = min(prompts), max(prompts)
    together = takewhile(lambda ids: ids[0] == ids[1], zip(first, last, strict=False))
    return [token for token, _ in together]
