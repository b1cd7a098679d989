"""From a pair, and what the user fixed, to how it decodes on this machine."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from dspark_batch.engine.cache import RaggedCache
from dspark_batch.engine.fallback import DrafterFault, guarded
from dspark_batch.engine.machine import Machine, kept
from dspark_batch.engine.probe import default_limits, numerics, probe, time_drafter
from dspark_batch.engine.scheduler import DrafterPass, Plan, StepCurve, best_plan, can_pay
from dspark_batch.engine.shapes import Shapes
from dspark_batch.errors import UsageError
from dspark_batch.models.load import Pair
from dspark_batch.types import Json

_CACHE_SHARE = 0.6  # of the memory that is left beside the weights
_PREFIX_SHARE = 0.1  # of that, for the prefix cache
_USUAL_PROMPT = 512  # tokens, where the memory decides about slots
_PRIOR = 0.8  # chance of a draft if those before it are accepted; rounds will tell


@dataclass(frozen=True, slots=True)
class Setup:
    """How a pair decodes on this machine."""

    machine: Machine
    is_exact: bool
    curve: StepCurve  # what rounds cost
    plan: Plan
    draft_length: int | None  # for the engine; None: each round drafts what pays
    most_positions: int  # that all slots may cache
    prefix_positions: int

    @property
    def shapes(self) -> Shapes:
        """The passes that may run."""
        return self.machine.shapes if self.is_exact else Shapes(folds=self.machine.shapes.folds)

    def to_json(self) -> dict[str, Json]:
        """Describe it for the manifest."""
        return {
            "mode": "exact" if self.is_exact else "fast",
            "plan": {
                "slots": self.plan.slots,
                "draft_length": self.plan.draft_length,
                "expected_tokens_per_s": round(self.plan.tokens_per_s, 1),
                "why": self.plan.why,
            },
            "most_positions": self.most_positions,
            "drafter": [list(each) for each in self.curve.drafter],
            "machine": self.machine.to_json(),
        }


def _silently() -> None:
    """Tell nobody."""


def set_up(  # noqa: PLR0913  what the user fixed, each with a default
    pair: Pair,
    *,
    slots: int | None = None,
    draft_length: int | None = None,
    is_exact: bool = True,
    max_tokens: int = 512,
    num_items: int | None = None,
    begun: Mapping[str, Json] | None = None,
    on_measure: Callable[[], None] = _silently,
) -> Setup:
    """Measure, or remember, what passes cost and which are alike here, and plan by it.

    Args:
        pair: as loaded.
        slots: None: what pays and fits into the memory.
        draft_length: None: what pays; rounds will choose again.
        is_exact: keep to the shape class.
        max_tokens: of an answer; with it the memory is planned.
        num_items: that are to be answered; None: unknown.
        begun: what `Setup.to_json` said when the job began: its class is kept if this machine
            still gives its bits; None: the job begins.
        on_measure: called before something is measured that nobody remembers.

    Raises:
        UsageError: no pass of the class has room for what is asked.
    """
    most_positions = int(_CACHE_SHARE * _free_bytes() / _bytes_per_position(pair))
    machine = _machine(pair, begun, most_positions, on_measure)
    curve = machine.curve(_drafter_passes(pair, machine, on_measure), exact=is_exact)
    longest = min(pair.config.context_length, _USUAL_PROMPT + max_tokens)
    survival = [_PRIOR**k for k in range(1, pair.drafter.block_size + 1)]
    asked = {"slots": slots, "draft_length": draft_length}
    most_slots = max(1, most_positions // longest)
    if num_items:
        most_slots = min(most_slots, num_items)
    try:
        plan = best_plan(curve, survival, **asked, most_slots=most_slots)
    except ValueError as error:
        if is_exact or slots is None:
            raise UsageError(_impossible(machine, slots, draft_length)) from error
        length = pair.drafter.block_size if draft_length is None else draft_length
        plan = Plan(slots, length, 0.0, "as asked; a pass of this size was not measured")
    is_long = num_items is not None and num_items > plan.slots  # so few decode at its end only
    is_open = draft_length is None and len(survival) > 0
    if is_open and is_long and not can_pay(curve, plan.slots, len(survival)):
        draft_length = 0  # to keep a drafter ready takes time, too
        plan = replace(plan, why=f"{plan.why}; drafts could not pay even if all were right")
    prefix_positions = int(_PREFIX_SHARE * most_positions)
    return Setup(machine, is_exact, curve, plan, draft_length, most_positions, prefix_positions)


class _NotKept(Exception):
    """Nobody remembers a measurement."""


def is_measured(pair: Pair) -> bool:
    """Whether `set_up` remembers the passes of a pair's target on this machine."""

    def measure() -> Json:
        raise _NotKept

    try:
        kept(_name(pair, "target"), measure)
    except _NotKept:
        return False
    return True


def _machine(
    pair: Pair,
    begun: Mapping[str, Json] | None,
    most_positions: int,
    on_measure: Callable[[], None],
) -> Machine:
    """Take the machine as the job knew it, if it is still the same one, or as it is known."""
    if begun is not None:
        before = Machine.from_json(begun["machine"])
        if numerics(pair.target, before.shapes) == before.numerics:
            return before
    limits = default_limits()._replace(most_positions=most_positions)

    def measure() -> Json:
        on_measure()
        return probe(pair.target, limits).to_json()

    return Machine.from_json(kept(_name(pair, "target"), measure))


def _drafter_passes(
    pair: Pair, machine: Machine, on_measure: Callable[[], None]
) -> list[DrafterPass]:
    drafter = pair.drafter
    if drafter.block_size == 0:
        return []
    counts = sorted({each.slots for each in machine.target + machine.others})
    name = _name(pair, "target", "drafter")

    def measure() -> Json:
        on_measure()
        return guarded(partial(_timed, pair, counts))

    try:
        measured = kept(name, measure)
    except DrafterFault:  # its items will say so
        measured = [(n, machine.curve([], exact=False).verify_s(n, 1)) for n in counts]
    return [DrafterPass(*each) for each in measured]


def _timed(pair: Pair, slots: Sequence[int]) -> list[list[float]]:
    return [list(each) for each in time_drafter(pair.target, pair.drafter, slots)]


def _name(pair: Pair, *parts: str) -> str:
    identity = pair.config.identity
    known = [(identity.get(part), identity.get(f"{part}_bits")) for part in parts]
    return f"{known} {pair.config.dtype}"


def _free_bytes() -> int:
    """Say how much memory is left for caches: of the GPU, or half of the machine's."""
    if mx.default_device() == mx.Device(mx.cpu):
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    else:
        known = mx.device_info()  # by Metal's name, or by CUDA's
        whole = known.get("max_recommended_working_set_size") or known["total_memory"]
    return max(1, whole - mx.get_active_memory())


def _bytes_per_position(pair: Pair) -> int:
    """Count the bytes that a cached token takes, by the shapes of a pass that is never run."""
    cache = RaggedCache(pair.target.num_caches, 1)
    context = RaggedCache(pair.drafter.num_layers, 1)
    for each in (cache, context):
        each.reserve(1)
    _, features = pair.target(mx.array([[0]]), cache.layers)
    buffers = cache.buffers()
    try:
        guarded(partial(pair.drafter.extend, context, features))
        buffers += context.buffers()
    except DrafterFault:  # its items will say so, and cache nothing of it
        pass
    return sum(array.nbytes // array.shape[2] for array in buffers)


def _impossible(machine: Machine, slots: int | None, draft_length: int | None) -> str:
    most = max(each.slots for each in machine.target)
    width = max(each.width for each in machine.target)
    asked = [f"--slots {slots}"] * (slots is not None)
    asked += [f"--draft-length {draft_length}"] * (draft_length is not None)
    return (
        f"{' with '.join(asked) or 'the drafter'}: exact decoding has passes of at most {most} "
        f"slots and {width - 1} drafts here. Take fewer, or --mode fast."
    )
