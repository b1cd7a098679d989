"""The registered pairs, and which of them are on this disk."""

from dataclasses import dataclass
from typing import Literal

from dspark_batch.errors import ModelError

OnDisk = Literal["yes", "no", "in part"]


@dataclass(frozen=True, slots=True)
class RegisteredPair:
    """A target and its drafter, as `--family` names them."""

    family: str
    target: str  # directory or Hub id
    drafter: str
    target_params: int
    drafter_params: int | None  # None: not told
    memory_bytes: int  # of all weights as they are stored, what both have held once
    position_bytes: int  # that a cached token of the target takes
    state_bytes: int  # that a slot takes besides
    thinking: bool  # whether the drafter was trained on answers with thinking
    source: str  # of the drafter
    bundled: bool  # comes with this package
    target_on_disk: OnDisk
    drafter_on_disk: OnDisk
    damage: tuple[str, ...]  # what is wrong with the parts that are here

    @property
    def on_disk(self) -> str:
        """Say which parts are here, in a few words."""
        states = (self.target_on_disk, self.drafter_on_disk)
        if "in part" in states:
            return "in part"
        if states[0] == states[1]:
            return states[0]
        return "target only" if states[0] == "yes" else "drafter only"


def list_pairs() -> list[RegisteredPair]:
    """List what `--family` knows; asks the disk, never the network."""
    # MLX loads only now, so that this module can be named without it.
    from dspark_batch.models.pairs import KNOWN_PAIRS

    return [_registered(family) for family in KNOWN_PAIRS]


def _registered(family: str) -> RegisteredPair:
    from dspark_batch.models.pairs import known_pair

    known, states, damage = known_pair(family), [], []
    for name in (known.target, known.drafter):
        state, reason = _state(name)
        states.append(state)
        damage += [reason] if reason else []
    return RegisteredPair(
        family=family,
        target=known.target,
        drafter=known.drafter,
        target_params=known.target_params,
        drafter_params=known.drafter_params,
        memory_bytes=known.memory_bytes,
        position_bytes=known.position_bytes,
        state_bytes=known.state_bytes,
        thinking=known.thinking,
        source=known.source,
        bundled=known.bundled,
        target_on_disk=states[0],
        drafter_on_disk=states[1],
        damage=tuple(damage),
    )


def _state(name: str) -> tuple[OnDisk, str | None]:
    """Say whether a checkpoint is here, and what is wrong with it; None: nothing."""
    from dspark_batch.models.hub import cached

    try:
        return ("yes" if cached(name) else "no"), None
    except ModelError as error:
        return "in part", str(error)
