"""From a pair, and what the user fixed, to how it decodes on this machine."""

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from dspark_batch import blas, device
from dspark_batch.engine.conformance import Conformance, conformance
from dspark_batch.engine.fallback import DrafterFault, guarded
from dspark_batch.engine.shapes import FALLBACK, Shapes
from dspark_batch.errors import UsageError
from dspark_batch.pair import Pair
from dspark_batch.tuning import kept
from dspark_batch.tuning.pace import Costs, Weights
from dspark_batch.types import SetupJson

_CACHE_SHARE = 0.6  # of the memory that is left beside the weights
_PREFIX_SHARE = 0.1  # of that, for the prefix cache
_USUAL_PROMPT = 512  # tokens, where the memory decides about slots

_IS_CPU = device.is_cpu()
# Tokens of a round that are worth their pass, and most slots. A rule: rounds tell what it costs.
_ROUND_TOKENS, _MOST_SLOTS = 512, 64 if _IS_CPU else 128
_GOOD_TOKENS = 256 if _IS_CPU else 512  # more of them pay in jobs of many items only
# Tokens of a pass that take as long as reading the weights for them; a rule as well.
_FREE_TOKENS = 24 if _IS_CPU else 512


@dataclass(frozen=True, slots=True)
class Plan:
    """How a job begins; rounds will tell which drafts pay."""

    slots: int
    draft_length: int  # 0: without speculation
    why: str  # one sentence for people


@dataclass(frozen=True, slots=True)
class Setup:
    """How a pair decodes on this machine."""

    conformance: Conformance
    plan: Plan
    lengths: tuple[int, ...]  # draft lengths that rounds may have
    costs: Weights  # of the parts of a round, as known before the job
    name: str  # of the pair, under which costs are kept
    dtype: str
    most_positions: int  # that all slots may cache
    prefix_positions: int
    state_positions: int  # what a slot remembers besides, as many positions take as much

    @property
    def shapes(self) -> Shapes:
        """The passes that may run."""
        return self.conformance.shapes

    def keep_learnt(self, costs: Costs) -> None:
        """Keep what a job learnt: verdicts, which are facts, and costs as a hint."""
        kept.keep_verdicts()
        if costs.is_worth_keeping:
            kept.keep_costs(self.name, costs.weights())

    def to_json(self) -> SetupJson:
        """Describe it for the manifest."""
        return {
            "plan": {
                "slots": self.plan.slots,
                "draft_length": self.plan.draft_length,
                "why": self.plan.why,
            },
            "step_shape": self.shapes.fixed,
            "divergence": self.conformance.divergence,
            "dtype": self.dtype,
            "most_positions": self.most_positions,
            "machine": kept.machine(),
            "blas_threads": blas.num_threads(),
        }


def set_up(  # noqa: PLR0913  what a plan follows from
    pair: Pair,
    *,
    slots: int | None = None,
    draft_length: int | None = None,
    is_paced: bool = True,
    max_tokens: int = 512,
    num_items: int | None = None,
    known: Conformance | None = None,
) -> Setup:
    """Check that a target's bits do not depend on the shape of a pass, and plan by rules.

    Args:
        pair: as loaded.
        slots: None: as many as are worth a pass and fit into the memory.
        draft_length: None: the drafter's block.
        is_paced: whether rounds then choose what pays.
        max_tokens: of an answer; with it the memory is planned.
        num_items: that are to be answered; None: unknown.
        known: of the same target, from an earlier call; None: it is found.

    Raises:
        UsageError: what is asked cannot be served.
        ModelError: the target's answers could not be repeated here.
    """
    found = known or _conformance(pair)
    per_position, per_slot = _cached_bytes(pair)
    most_positions = int(_CACHE_SHARE * _free_bytes() / per_position)
    state_positions = -(-per_slot // per_position)
    longest = min(pair.config.context_length, _USUAL_PROMPT + max_tokens)
    block_size = pair.drafter.block_size
    most_slots = most_positions // (longest + state_positions)
    if found.shapes.fixed is not None:
        most_slots, block_size = FALLBACK[0], min(block_size, FALLBACK[1] - 1)
    where = "the memory here" if found.shapes.fixed is None else "the only pass of this target"
    _refuse_impossible(slots, draft_length, (max(1, most_slots), where), block_size)
    length = block_size if draft_length is None else draft_length
    good = max(1, _GOOD_TOKENS // (1 + length))
    limits = {
        "tokens that are worth a pass": max(1, min(_MOST_SLOTS, _ROUND_TOKENS // (1 + length))),
        "memory": max(1, most_slots),
        "items": _slots_for(num_items or 3 * _GOOD_TOKENS, good),
    }
    limit = min(limits, key=limits.__getitem__)
    why = "slots as asked" if slots else f"slots by {limit}"
    unasked = "; rounds choose how many drafts" if is_paced else "; whole blocks of drafts"
    why += "; drafts as asked" if draft_length is not None else unasked
    if pair.drafter.block_size == 0:
        why = why.partition(";")[0] + "; no drafter"
    parts = ("target", "target_bits", "drafter", "drafter_bits")
    name = str([*map(pair.config.identity.get, parts), pair.config.dtype])
    return Setup(
        conformance=found,
        plan=Plan(slots or limits[limit], length, why),
        lengths=_lengths(block_size),
        costs=kept.read_costs(name) or _rule(pair),
        name=name,
        dtype=pair.config.dtype,
        most_positions=most_positions,
        prefix_positions=int(_PREFIX_SHARE * most_positions),
        state_positions=state_positions,
    )


def _slots_for(num_items: int, good: int) -> int:
    """Say how many slots items fill: more than a good number only if there are three items each.

    The last answers of a job leave slots free, and a job that is all end has few full passes.
    """
    return num_items if num_items >= 3 * good else min(num_items, good)


def _conformance(pair: Pair) -> Conformance:
    kept.read_verdicts()
    found = conformance(pair.target)
    kept.keep_verdicts()
    return found


def _lengths(block_size: int) -> tuple[int, ...]:
    """List draft lengths to choose from; a GPU compiles for each one."""
    if _IS_CPU:
        return tuple(range(block_size + 1))
    return tuple(sorted({0, block_size // 4, block_size // 2, block_size}))


def _rule(pair: Pair) -> Weights:
    """Say what a round costs in target passes: reading weights, and a little for each token."""
    share = pair.drafter.num_layers / pair.target.facts.num_layers
    return 1.0, 1 / _FREE_TOKENS, share, share / _FREE_TOKENS


def _refuse_impossible(
    slots: int | None, draft_length: int | None, most: tuple[int, str], block_size: int
) -> None:
    (most_slots, where), problems = most, []
    if slots is not None and slots > most_slots:
        problems.append(f"--slots {slots} do not fit into {where}: 1 to {most_slots} do")
    if draft_length is not None and draft_length > block_size:
        problems.append(f"--draft-length {draft_length} is too long: 0 to {block_size} work")
    if problems:
        raise UsageError(f"{'; '.join(problems)}. Take one of these, or leave it out.")


def _free_bytes() -> int:
    """Say how much memory is left for caches: of the GPU, or half of the machine's."""
    whole: int
    if _IS_CPU:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    else:
        known = mx.device_info()  # by Metal's name, or by CUDA's
        whole = int(known.get("max_recommended_working_set_size") or known["total_memory"])
    return max(1, whole - mx.get_active_memory())


def _cached_bytes(pair: Pair) -> tuple[int, int]:
    """Say what caches take for a position, and for a slot besides: told by shapes, never run."""
    cache, context = pair.target.make_cache(1, 1), pair.drafter.make_cache(1, 1)
    _, features = pair.target(mx.array([[0]]), cache)
    with suppress(DrafterFault):  # its items will say so, and cache nothing of it
        guarded(partial(pair.drafter.extend, context, features))
    cache.keep(mx.array([1]))
    # At least 1, since nothing grows with a slot of a target without attention.
    per_position = max(1, cache.bytes_per_position + context.bytes_per_position)
    return per_position, cache.bytes_per_slot
