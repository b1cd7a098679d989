"""How large a drafter is that nobody gave sizes for: a rule, from the target's own sizes."""

from dspark_batch import device
from dspark_batch.drafters.new_config import Sizes
from dspark_batch.errors import UsageError
from dspark_batch.models.target import TargetFacts
from dspark_batch.train.training import Asked

_LAYERS_PER_DRAFT_LAYER = 7  # DeepSpec: 36 layers and 40 have a drafter of 5
_MOST_LAYERS, _MOST_TAPS, _MOST_RANK = 5, 5, 256
_BLOCK = 7
_GPU_TOKENS, _CPU_TOKENS = 16_384, 2_048
_MOST_LOGITS = 400 << 20  # of one step's slots; a step holds several arrays of them
_SLOTS_PER_TOKEN = 0.5
_RATE, _RATE_HIDDEN = 6e-4, 2560  # DeepSpec's rate, for a target of this width


def sizes_for(facts: TargetFacts, asked: Asked) -> Sizes:
    """Choose what was not asked for.

    Raises:
        UsageError: the taps are no layers of this target, or a DFlash drafter was given a rank.
    """
    kind = asked.kind or "dspark"
    if kind == "dflash" and asked.rank:
        raise UsageError(
            f"--rank is {asked.rank}, but a DFlash drafter has no Markov head. Leave --rank out, "
            "or train with --kind dspark."
        )
    by_rule = min(_MOST_RANK, 64 * -(-facts.hidden_size // 512))
    rank = by_rule if asked.rank is None else asked.rank
    layers = max(1, min(_MOST_LAYERS, round(facts.num_layers / _LAYERS_PER_DRAFT_LAYER)))
    return Sizes(
        kind=kind,
        layers=asked.layers or layers,
        block=asked.block or _BLOCK,
        taps=_spread(facts.num_layers)
        if asked.taps is None
        else _checked(asked.taps, facts.num_layers),
        rank=0 if kind == "dflash" else rank,
    )


def _spread(num_layers: int) -> tuple[int, ...]:
    """Spread taps evenly from layer 1 to the third from the end, as DeepSpec's are."""
    last = max(0, num_layers - 3)
    first = min(1, last)
    count = min(_MOST_TAPS, last - first + 1)
    steps = max(1, count - 1)
    return tuple(first + round((last - first) * i / steps) for i in range(count))


def _checked(taps: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    if list(taps) != sorted(set(taps)) or taps[0] < -1 or taps[-1] >= num_layers:
        raise UsageError(
            f"--taps is {','.join(map(str, taps))}, expected rising layer numbers from -1 (the "
            f"embedding) to {num_layers - 1}."
        )
    return taps


def tokens_per_step(vocab_size: int) -> int:
    """Choose how many tokens a step reads: fewer with a large vocabulary, for the memory."""
    tokens = _CPU_TOKENS if device.is_cpu() else _GPU_TOKENS
    while tokens > _CPU_TOKENS and tokens * _SLOTS_PER_TOKEN * vocab_size > _MOST_LOGITS:
        tokens //= 2
    return tokens


def anchors_of(width: int, block: int) -> int:
    """Choose how many blocks a row has: their slots are half as many as the row's positions."""
    return max(1, min(512, round(width * _SLOTS_PER_TOKEN / block)))


def peak_rate(hidden_size: int) -> float:
    """Choose the learning rate: DeepSpec's, and more for a narrow model."""
    return _RATE * min(3.0, max(1.0, (_RATE_HIDDEN / hidden_size) ** 0.5))
