"""What an item chooses for itself, over what the job says for all."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from dspark_batch.intake.messages import Fields, Unusable, from_text
from dspark_batch.spec.nearest import nearest
from dspark_batch.spec.spec import Spec
from dspark_batch.spec.structure import ANY_OBJECT, structure_of
from dspark_batch.types import MOST_LOGPROBS, Json, Sampling, Structure, StructureKind

COLUMN = "sampling_params"

CHOICES = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "max_tokens"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "bad_words"),
    *("min_tokens", "ignore_eos", "logprobs", "top_logprobs", "prompt_logprobs"),
    *("response_format", "structured_outputs", "guided_decoding"),
    *("guided_json", "guided_regex", "guided_grammar", "guided_choice"),
)
OTHER_WORDS = {  # of OpenAI, of Transformers, of Mistral
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "random_seed": "seed",
}
ONLY = {  # fields with values that ask for nothing that we lack
    **{"n": (1,), "best_of": (1,), "stream": (False,)},
    **{"length_penalty": (1,), "skip_special_tokens": (True,), "detokenize": (True,)},
    **{"spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,)},
    **{
        "use_beam_search": (False,),
        "modalities": (["text"],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
    },
    **{"functions": ([],), "function_call": ("none", "auto"), "echo": (False,), "suffix": ("",)},
    **{"extra_body": ({},), "extra_headers": ({},), "extra_query": ({},)},
    **{"safe_prompt": (False,), "include_reasoning": (True,), "separate_reasoning": (True,)},
}

Biases: TypeAlias = tuple[tuple[int, float], ...]
Chosen: TypeAlias = float | tuple[str, ...] | frozenset[int] | Biases | Structure | None

_KIND_BY_WORD: dict[str, StructureKind] = {  # vLLM's words
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
_WHOLE = ("top_k", "seed", "max_tokens", "min_tokens", "top_logprobs")
_TOKEN = re.compile(r"[0-9]{1,9}")
_MOST = 1e300  # that a float can hold, and nobody means
_MOST_TOP_K = 2**31 - 1  # no vocabulary has more


def choices_of(
    own: Json, spec: Spec, column: str = COLUMN, fields: Fields | None = None
) -> tuple[Sampling, int]:
    """Return how a record's answer is drawn, and its most tokens.

    Args:
        own: what the record says; it goes before the job's. A null is as if it were not there.
        spec: the job.
        column: where the record says it, for messages.
        fields: knows what is ignored.

    Raises:
        Unusable: what is wrong with them.
    """
    own = from_text(own, "{")
    if own is None:
        return spec.sampling_of_all(), spec.max_tokens
    if not isinstance(own, dict):
        raise Unusable(f"`{column}` is {own!r}, expected an object.")
    given = _in_our_words((fields or Fields()).given(own), column)
    chosen: dict[str, Any] = {
        name: _chosen(f"`{column}.{name}`", name, value) for name, value in given.items()
    }
    max_tokens = chosen.pop("max_tokens", spec.max_tokens)
    if max_tokens < 1:
        raise Unusable(f"`{column}.max_tokens` is {max_tokens}, expected 1 or more.")
    if "stop_token_ids" in chosen:
        chosen["stop_ids"] = chosen.pop("stop_token_ids")
    _join_logprobs(chosen, spec, column)
    _join_structures(chosen, column)
    try:
        sampling = replace(spec.sampling_of_all(), **chosen)
    except ValueError as error:
        raise Unusable(f"`{column}`: {error}.") from error
    if sampling.min_tokens > max_tokens:
        raise Unusable(
            f"`{column}.min_tokens`: {sampling.min_tokens} tokens are more than max_tokens, "
            f"{max_tokens}; lower the one, or raise the other."
        )
    return sampling, max_tokens


def _join_logprobs(chosen: dict[str, Chosen], spec: Spec, column: str) -> None:
    """Make one number of OpenAI's two words for log-probabilities."""
    num_top: Any = chosen.pop("top_logprobs", 0)
    if not 0 <= num_top <= MOST_LOGPROBS:
        raise Unusable(f"`{column}.top_logprobs` is {num_top}, expected 0 to {MOST_LOGPROBS}.")
    if not num_top:
        return
    if chosen.get("logprobs", spec.logprobs) is None:
        raise Unusable(f"`{column}.top_logprobs` needs `logprobs` true beside it; add that.")
    chosen["logprobs"] = num_top


def _join_structures(chosen: dict[str, Chosen], column: str) -> None:
    """Take what an answer must look like from the one field that says it."""
    names = [name for name in _STRUCTURED if name in chosen]
    if len(names) > 1:
        raise Unusable(f"`{column}.{names[0]}` and `{column}.{names[1]}` exclude each other.")
    for name in names:
        chosen["structure"] = chosen.pop(name)


def _in_our_words(given: Mapping[str, Json], column: str) -> dict[str, Json]:
    """Select what is to be obeyed, under our names.

    Raises:
        Unusable: a field asks for something else.
    """
    ours: dict[str, Json] = {}
    for name, value in given.items():
        if name in ONLY:
            _refuse_other(name, value, column)
            continue
        word = OTHER_WORDS.get(name, name)
        if word not in CHOICES:
            known = (*CHOICES, *OTHER_WORDS, *ONLY)
            raise Unusable(f"`{column}.{name}` is not supported{nearest(name, known)}.{_way(name)}")
        if word in ours and ours[word] != value:
            raise Unusable(f"`{column}.{name}` says `{word}` a second time; keep one of them.")
        ours[word] = value
    return ours


def _refuse_other(name: str, value: Json, column: str) -> None:
    """Refuse a value that asks for what we lack; True is no 1, and a null says nothing."""
    if isinstance(value, dict):
        value = {inner: each for inner, each in value.items() if each is not None}
    for only in ONLY[name]:
        if value == only and isinstance(value, bool) == isinstance(only, bool):
            return
    instead = " Use --samples for several answers." if name == "n" else _way(name)
    raise Unusable(f"`{column}.{name}` is {value!r}, which is not supported.{instead}")


def _way(name: str) -> str:
    return f" Take it out, or leave it aside with --ignore-fields {name}."


def _chosen(where: str, name: str, value: Json) -> Chosen:
    if name in _READERS:
        return _READERS[name](where, value)
    if name in _GUIDED:
        return _structure(where, _KIND_BY_WORD[name.removeprefix("guided_")], value)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is not None and name in _WHOLE:
        number = _whole(number)
    if number is None or (name != "seed" and abs(number) > _MOST):
        expected = "a whole number" if name in _WHOLE else "a number"
        raise Unusable(f"{where} is {value!r}, expected {expected}.")
    if name == "top_k":  # -1 is vLLM's word for all
        return 0 if number == -1 else min(number, _MOST_TOP_K)
    return number


def _whole(value: float) -> int | None:
    """Read 4.0 as 4: tables with nulls keep integers so. None: it is not whole."""
    if isinstance(value, int):
        return value
    return int(value) if math.isfinite(value) and value.is_integer() else None


def _texts(where: str, value: Json) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Unusable(f"{where} is {value!r}, expected a string or a list of strings.")
    return tuple(texts)


def _ids(where: str, value: Json) -> frozenset[int]:
    ids = [_id(each) for each in value] if isinstance(value, list) else [None]
    known = frozenset(each for each in ids if each is not None)
    if None in ids:
        raise Unusable(f"{where} is {value!r}, expected a list of token ids.")
    return known


def _id(value: Json) -> int | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        return None
    return _whole(value)


def _biases(where: str, value: Json) -> tuple[tuple[int, float], ...]:
    """Read {"token id": bias}; a null, which tables fill gaps with, says nothing."""
    if not isinstance(value, dict):
        raise Unusable(f"{where} is {value!r}, expected an object of token ids and numbers.")
    biases: dict[int, float] = {}
    for name, bias in value.items():
        if bias is None:
            continue
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not _TOKEN.fullmatch(name) or not isinstance(bias, int | float) or not is_number:
            raise Unusable(f"{where} has {name!r}: {bias!r}, expected a token id and a number.")
        if int(name) in biases:
            raise Unusable(f"{where} names token {int(name)} twice; keep one.")
        biases[int(name)] = bias
    return tuple(sorted(biases.items()))


def _num_top(where: str, value: Json) -> int | None:
    """Read how many log-probabilities are told: true is the chosen token's alone."""
    if isinstance(value, bool):
        return 0 if value else None
    whole = _whole(value) if isinstance(value, int | float) else None
    if whole is None:
        raise Unusable(f"{where} is {value!r}, expected true, false or a whole number.")
    return whole


def _flag(where: str, value: Json) -> bool:
    if not isinstance(value, bool):
        raise Unusable(f"{where} is {value!r}, expected true or false.")
    return value


def _format(where: str, value: Json) -> Structure | None:
    """Read OpenAI's words for what an answer must look like."""
    value = from_text(value, "{")
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        kinds = "an object whose `type` is text, json_object or json_schema"
        raise Unusable(f"{where} is {value!r}, expected {kinds}.")
    if kind == "text":
        return None
    if kind == "json_object":
        return _structure(where, "json_schema", ANY_OBJECT)
    told = from_text(value.get("json_schema"), "{")
    if not isinstance(told, dict) or told.get("schema") is None:
        raise Unusable(f"{where} has no `json_schema.schema`; add it.")
    return _structure(f"{where[:-1]}.json_schema.schema`", "json_schema", told["schema"])


def _structured(where: str, value: Json) -> Structure | None:
    """Read vLLM's words for what an answer must look like."""
    value = from_text(value, "{")
    if not isinstance(value, dict):
        raise Unusable(f"{where} is {value!r}, expected an object.")
    given = {name: each for name, each in value.items() if each not in (None, False)}
    if len(given) != 1:
        raise Unusable(f"{where} says {len(given)} things, expected one of {_WORDS}.")
    ((name, each),) = given.items()
    if name == "json_object" and each is True:
        return _structure(where, "json_schema", ANY_OBJECT)
    if name not in _KIND_BY_WORD:
        raise Unusable(f"{where} has `{name}`, which is not supported; expected one of {_WORDS}.")
    return _structure(f"{where[:-1]}.{name}`", _KIND_BY_WORD[name], each)


def _structure(where: str, kind: StructureKind, value: Json) -> Structure:
    try:
        return structure_of(kind, value)
    except ValueError as error:
        raise Unusable(f"{where} {error}.") from error


_WORDS = ", ".join((*_KIND_BY_WORD, "json_object"))
_GUIDED = tuple(f"guided_{word}" for word in _KIND_BY_WORD)
_STRUCTURED = ("response_format", "structured_outputs", "guided_decoding", *_GUIDED)
_READERS: dict[str, Callable[[str, Json], Chosen]] = {
    "stop": _texts,
    "stop_token_ids": _ids,
    "bad_words": _texts,
    "logit_bias": _biases,
    "ignore_eos": _flag,
    "logprobs": _num_top,
    "prompt_logprobs": _num_top,
    "response_format": _format,
    "structured_outputs": _structured,
    "guided_decoding": _structured,
}
