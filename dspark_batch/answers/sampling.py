"""Which rule a round follows, from what its slots hold."""

import hashlib
import json
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from typing import TypeAlias

import mlx.core as mx

from dspark_batch.answers.sequence import Score, Sequence
from dspark_batch.answers.steering import Answer, steering_of
from dspark_batch.numerics.chance import Chance
from dspark_batch.numerics.rules import Coupled, Greedy, Rejection, Rule, Scored, Steered
from dspark_batch.numerics.sampling import Filters, Settings
from dspark_batch.numerics.scores import Scores
from dspark_batch.types import Request, Sampling, SamplingRule

Positions: TypeAlias = Callable[[], mx.array]

RULES: dict[SamplingRule, type[Coupled] | type[Rejection]] = {
    "coupled": Coupled,
    "rejection": Rejection,
}

_GREEDY = Sampling()


def rule_of(name: SamplingRule, sequences: ListLike[Sequence | None], positions: Positions) -> Rule:
    """Make the rule for one round, or for first tokens.

    It knows what is committed of the answers, so it is made when the host has read the round before
    if `steers` says so.

    Args:
        name: what draws if a slot has a temperature; without one, nothing pays for noise.
        sequences: by slot; None: free.
        positions: gives those of the answer tokens that are decided first, [S] int32.
    """
    rule = _drawn(name, sequences, positions)
    if steers(sequences):
        slots = [Answer(s.wish, s.token_ids) if s and s.wish else None for s in sequences]
        rule = Steered(rule, steering_of(slots))
    told = [s.request.sampling.logprobs for s in sequences if s is not None]
    asked = [num_top for num_top in told if num_top is not None]
    return Scored(rule, max(asked)) if asked else rule


def steers(sequences: ListLike[Sequence | None]) -> bool:
    """Whether some of the sequences change logits by what is committed of their answers."""
    return any(s is not None and s.wish is not None for s in sequences)


def _drawn(name: SamplingRule, sequences: ListLike[Sequence | None], positions: Positions) -> Rule:
    samplings = [s.request.sampling if s else _GREEDY for s in sequences]
    if all(sampling.is_greedy for sampling in samplings):
        return Greedy()
    keys = mx.array([noise_key(s.request) if s else (0, 0) for s in sequences], dtype=mx.uint32)
    return RULES[name](_settings(samplings), Chance(keys, positions()))


def scores_of(scores: Scores | None) -> list[list[Score]]:
    """Bring scores to the host, by slot and token; []: nobody asked."""
    if scores is None:
        return []
    parts = (array.tolist() for array in scores)
    return [list(map(Score, *slot)) for slot in zip(*parts, strict=True)]


def noise_key(request: Request) -> tuple[int, int]:
    """Name the noise of an item: two 32-bit words out of its seed and its identity."""
    item = request.item
    identity = [request.sampling.seed, item.custom_id, item.digest, item.sample_index]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _settings(samplings: ListLike[Sampling]) -> Settings:
    temperature = mx.array([0.0 if s.is_greedy else s.temperature for s in samplings])
    if not any(s.has_filters for s in samplings):
        return Settings(temperature)
    filters = Filters(
        mx.array([s.top_k for s in samplings]),
        mx.array([s.top_p for s in samplings]),
        mx.array([s.min_p for s in samplings]),
    )
    return Settings(temperature, filters)
