"""From the body of a live request to requests for the engine."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import orjson

from dspark_batch.hub import Hub
from dspark_batch.intake.openai import CHAT
from dspark_batch.intake.reader import digest_of
from dspark_batch.opening import Opened, ask
from dspark_batch.serve.problems import Problem, bad_field, problem_of
from dspark_batch.serve.service import Service
from dspark_batch.types import Failure, Item, Json, Request

_MOST_CHOICES = 128  # prompts of one request
_NAME = "live"  # of every live item: with the same seed it draws the same


@dataclass(frozen=True, slots=True)
class Asked:
    """What a live request asks for."""

    requests: tuple[Request, ...]  # one for each choice of the answer
    is_chat: bool
    is_streamed: bool
    has_usage: bool  # whether a stream ends with it


def asked_in(body: dict[str, Json], path: str, service: Service, hub: Hub) -> Asked:
    """Read a live request; runs the chat template and the tokenizer.

    Args:
        body: of it.
        path: to which it was sent.
        service: knows the model's names.
        hub: has the tokenizer.

    Raises:
        Problem: what is wrong with it.
    """
    body = dict(body)
    check_model(body.get("model"), service)
    is_streamed = _flag(body, "stream")
    has_usage = _has_usage(body.pop("stream_options", None))
    opened = hub.opened()
    prompts = [None] if path == CHAT else _prompts(body.get("prompt"), opened)
    requests = [_request(body, path, prompt, service, opened) for prompt in prompts]
    if is_streamed and any(r.sampling.prompt_logprobs is not None for r in requests):
        message = "`prompt_logprobs` do not come in a stream; ask without `stream`."
        raise bad_field("prompt_logprobs", message)
    return Asked(tuple(requests), path == CHAT, is_streamed, has_usage)


def check_model(name: Json, service: Service) -> None:
    """Refuse another model's name; without one, this one is meant.

    Raises:
        Problem: it is another's.
    """
    if name is not None and name not in service.model_names:
        served = ", ".join(service.model_names)
        message = f"No such model: {name!r}; this server has {served}."
        raise Problem(404, message, param="model", code="model_not_found")


def _flag(body: dict[str, Json], name: str) -> bool:
    value = body.pop(name, None)
    if not isinstance(value, bool | None):
        raise bad_field(name, f"`{name}` is {value!r}, expected true or false.")
    return bool(value)


def _has_usage(options: Json) -> bool:
    """Read `stream_options`; padding against listeners is harmless to leave out."""
    if options is None:
        return False
    if not isinstance(options, dict):
        raise bad_field("stream_options", f"`stream_options` is {options!r}, expected an object.")
    options = dict(options)
    has_usage = _flag(options, "include_usage")
    _flag(options, "include_obfuscation")
    for name, value in options.items():
        if value not in (None, False):
            raise bad_field("stream_options", f"`stream_options.{name}` is not supported.")
    return has_usage


def _prompts(prompt: Json, opened: Opened) -> Sequence[Json]:
    """List the prompts of a completion: each is a text, or token ids."""
    if not isinstance(prompt, list):
        return [prompt]  # if it is no text, reading it says so
    several = prompt if prompt and isinstance(prompt[0], str | list) else [prompt]
    if len(several) > _MOST_CHOICES:
        message = f"`prompt` has {len(several)} texts, expected at most {_MOST_CHOICES}."
        raise bad_field("prompt", message)
    for each in several:
        if isinstance(each, list) and not _are_ids(each, opened.vocab_size):
            below = f"token ids from 0 to {opened.vocab_size - 1}"
            raise bad_field("prompt", f"`prompt` has a list that is none of {below}.")
    return several


def _are_ids(values: Sequence[Json], vocab_size: int) -> bool:
    numbers = [each for each in values if isinstance(each, int) and not isinstance(each, bool)]
    are_below = all(0 <= each < vocab_size for each in numbers)
    return bool(values) and len(numbers) == len(values) and are_below


def _request(
    body: dict[str, Json], path: str, prompt: Json, service: Service, opened: Opened
) -> Request:
    if prompt is not None:
        body = body | {"prompt": prompt}
    try:
        digest = digest_of(orjson.dumps([path, body], option=orjson.OPT_SORT_KEYS))
    except orjson.JSONEncodeError as error:
        raise Problem(
            400, f"The body is nested too deeply ({error}).", code="invalid_json"
        ) from error
    if isinstance(prompt, list):  # as they are; the record says them as text
        body = body | {"prompt": opened.decode(prompt) or " "}
        opened = opened._replace(render=partial(_as_they_are, prompt))
    record: dict[str, Json] = {"method": "POST", "url": path, "body": body}
    request = ask(service.spec, opened, Item(0, _NAME, digest, "request", record))
    if isinstance(request, Failure):
        raise problem_of(request)
    sampling = request.sampling
    for token, _ in sampling.logit_bias:
        if token >= opened.vocab_size:
            known = f"expected token ids from 0 to {opened.vocab_size - 1}"
            raise bad_field("logit_bias", f"`logit_bias` names token {token}, {known}.")
    if sampling.is_greedy or body.get("seed", body.get("random_seed")) is not None:
        return request
    drawn = replace(sampling, seed=secrets.randbits(53))  # nobody asked to see the same again
    return replace(request, sampling=drawn)


def _as_they_are(token_ids: Sequence[int], conversation: str, **told: bool) -> Sequence[int]:
    return token_ids
