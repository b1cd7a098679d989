"""What an item chooses for itself, over what the job says for all."""

from dataclasses import replace

from dspark_batch.job.messages import Unusable
from dspark_batch.job.spec import Spec
from dspark_batch.types import Json, Sampling

COLUMN = "sampling_params"

_WHOLE, _NUMBER = (int,), (int, float)
_TYPES = {
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _WHOLE,
    "min_p": _NUMBER,
    "seed": _WHOLE,
    "max_tokens": _WHOLE,
    "stop": (str, list),
}


def choices_of(own: Json, spec: Spec, column: str = COLUMN) -> tuple[Sampling, int]:
    """Return how a record's answer is drawn, and its most tokens.

    Args:
        own: what the record says; it goes before the job's. A null is as if it were not there.
        spec: the job.
        column: where the record says it, for messages.

    Raises:
        Unusable: what is wrong with them.
    """
    if own is None:
        return spec.sampling_of_all(), spec.max_tokens
    if not isinstance(own, dict):
        raise Unusable(f"`{column}` is {own!r}, expected an object.")
    given = {
        name: _checked(f"{column}.{name}", name, value)
        for name, value in own.items()
        if value is not None
    }
    max_tokens = given.pop("max_tokens", spec.max_tokens)
    if max_tokens < 1:
        raise Unusable(f"`{column}.max_tokens` is {max_tokens}, expected 1 or more.")
    try:
        return replace(spec.sampling_of_all(), **given), max_tokens
    except ValueError as error:
        raise Unusable(f"`{column}`: {error}.") from error


def _checked(where: str, name: str, value: Json) -> float | tuple[str, ...]:
    if name not in _TYPES:
        raise Unusable(f"`{where}` is unknown; known are {', '.join(_TYPES)}.")
    strings = value if isinstance(value, list) else []
    fits = isinstance(value, _TYPES[name]) and not isinstance(value, bool)
    if not (fits and all(isinstance(s, str) for s in strings)):
        raise Unusable(f"`{where}` is {value!r}, expected {_expected(name)}.")
    if name != "stop":
        return value
    return tuple(strings) if isinstance(value, list) else (value,)


def _expected(name: str) -> str:
    texts = {_WHOLE: "a whole number", _NUMBER: "a number"}
    return texts.get(_TYPES[name], "a string or a list of strings")
