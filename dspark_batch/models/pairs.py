"""The registry: which target and drafter belong together."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dspark_batch.errors import UsageError

DEFAULT_FAMILY = "tiny"

_DEEPSPEC = "DeepSpec, trained on answers without thinking"
_ZLAB = "z-lab, DFlash, for answers with thinking"
# How the name of a target ends that somebody stored in another number type.
_CONVERTED = re.compile(r"(-(mlx|bf16|fp16|\d+bit|mxfp\d|nvfp4|dwq))+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class KnownPair:
    """A target and the drafter that was trained for it; directories or Hub ids.

    Source:
        Ids as in the README of github.com/deepseek-ai/DeepSpec and on the Hub. Parameters follow
        from the shapes that the configs ask for; those of a multimodal target are its text
        model's, which is what is loaded. Qwen3.5 and 3.6: the list of github.com/z-lab/dflash.
    """

    target: str
    drafter: str
    target_params: int
    drafter_params: int | None  # with copies of the target's embedding and head; None: not told
    shared_params: int  # of these, the copies
    position_bytes: int  # that a cached token of the target takes, in 16 bits
    source: str  # of the drafter
    state_bytes: int = 0  # that a slot takes besides, however long it is
    thinking: bool = False  # whether the drafter was trained on answers with thinking
    bundled: bool = False  # comes with this package

    @property
    def memory_bytes(self) -> int:
        """Bytes of both models' weights as they are stored, the copies held once.

        Without those of a drafter whose size is not told.
        """
        return 2 * (self.target_params + (self.drafter_params or 0) - self.shared_params)


def _bundled(part: str) -> str:
    return str(files("dspark_batch.tiny") / part)


KNOWN_PAIRS = {
    "tiny": KnownPair(
        _bundled("target"),
        _bundled("drafter"),
        target_params=6_394_688,
        drafter_params=2_963_969,
        shared_params=983_040,
        position_bytes=3_072,
        source="in this package, for demonstrations and tests",
        bundled=True,
    ),
    "qwen3": KnownPair(
        "Qwen/Qwen3-4B",
        "deepseek-ai/dspark_qwen3_4b_block7",
        target_params=4_022_468_096,
        drafter_params=1_393_133_569,
        shared_params=777_912_320,
        position_bytes=147_456,
        source=_DEEPSPEC,
    ),
    "qwen3-8b": KnownPair(
        "Qwen/Qwen3-8B",
        "deepseek-ai/dspark_qwen3_8b_block7",
        target_params=8_190_735_360,
        drafter_params=2_371_081_729,
        shared_params=1_244_659_712,
        position_bytes=147_456,
        source=_DEEPSPEC,
    ),
    "qwen3-14b": KnownPair(
        "Qwen/Qwen3-14B",
        "deepseek-ai/dspark_qwen3_14b_block7",
        target_params=14_768_307_200,
        drafter_params=3_416_263_169,
        shared_params=1_555_824_640,
        position_bytes=163_840,
        source=_DEEPSPEC,
    ),
    "gemma4": KnownPair(
        "google/gemma-4-12B-it",
        "deepseek-ai/dspark_gemma4_12b_block7",
        target_params=11_907_350_320,
        drafter_params=3_430_444_550,
        shared_params=2_013_265_920,
        position_bytes=344_064,
        source=_DEEPSPEC,
    ),
    **{
        f"qwen{version}-{size.lower()}": KnownPair(
            f"Qwen/Qwen{version}-{size}",
            f"z-lab/Qwen{version}-{size}-DFlash",
            target_params=target_params,
            drafter_params=drafter_params,
            shared_params=0,
            position_bytes=position_bytes,
            state_bytes=state_bytes,
            source=_ZLAB,
            thinking=True,
        )
        for version, size, target_params, drafter_params, position_bytes, state_bytes in (
            ("3.5", "4B", 4_205_751_296, None, 32_768, 51_511_296),
            ("3.5", "9B", 8_953_803_264, 1_048_626_432, 32_768, 51_511_296),
            ("3.5", "27B", 26_895_998_464, 1_730_213_120, 65_536, 153_944_064),
            ("3.5", "35B-A3B", 34_660_610_688, None, 20_480, 64_389_120),
            ("3.6", "27B", 26_895_998_464, 1_730_213_120, 65_536, 153_944_064),
            ("3.6", "35B-A3B", 34_660_610_688, None, 20_480, 64_389_120),
        )
    },
}


def known_pair(family: str) -> KnownPair:
    """Look a family up.

    Raises:
        UsageError: nobody registered it.
    """
    if family not in KNOWN_PAIRS:
        raise UsageError(
            f"--family {family}: unknown; known are {', '.join(sorted(KNOWN_PAIRS))}. "
            "Name one of these, or give --target and --drafter."
        )
    return KNOWN_PAIRS[family]


def pair_of(target: str | None, drafter: str | None = None) -> KnownPair | None:
    """Find the pair to which a target or a drafter belongs, by its name on the Hub.

    A target that others stored in another number type counts too, if its name says so:
    mlx-community/Qwen3-8B-4bit is Qwen/Qwen3-8B. A directory has no such name.
    """
    names = [_published(name) for name in (target, drafter) if name is not None]
    return next((p for p in KNOWN_PAIRS.values() if _is_named(p, *names)), None)


def drafter_for(
    family: str | None, target: str | None, drafter: str | None, *, drafts: bool = True
) -> str | None:
    """Say which drafter is meant: the one that is named, or that is known for a target's name.

    Args:
        family: and
        target: and
        drafter: as they were named; None: not.
        drafts: whether there will be any; else none is looked for.

    Returns:
        None: the family's, or there is none.
    """
    known = pair_of(target) if drafts and family is None and drafter is None else None
    return drafter if known is None else known.drafter


def _published(name: str) -> str:
    """Give a name as it is on the Hub, without a revision, in small letters."""
    return "" if Path(name).expanduser().is_dir() else name.partition("@")[0].lower()


def _is_named(pair: KnownPair, *names: str) -> bool:
    own = pair.target.lower(), pair.drafter.lower()
    return any(name in own or _is_conversion(name, own[0]) for name in names)


def _is_conversion(name: str, target: str) -> bool:
    """Whether a name is that of a target, of whatever owner, and says how it is stored."""
    name, target = (each.rpartition("/")[2] for each in (name, target))
    return name.startswith(target) and _CONVERTED.fullmatch(name[len(target) :]) is not None
