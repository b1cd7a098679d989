"""The registry: which target and drafter belong together."""

from dataclasses import dataclass
from importlib.resources import files

from dspark_batch.errors import UsageError

DEFAULT_FAMILY = "tiny"


@dataclass(frozen=True, slots=True)
class KnownPair:
    """A target and the drafter that was trained for it; directories or Hub ids."""

    target: str
    drafter: str


def _bundled(part: str) -> str:
    return str(files("dspark_batch.tiny") / part)


KNOWN_PAIRS = {
    "tiny": KnownPair(_bundled("target"), _bundled("drafter")),
    "qwen3": KnownPair("Qwen/Qwen3-4B", "deepseek-ai/dspark_qwen3_4b_block7"),
    "qwen3-8b": KnownPair("Qwen/Qwen3-8B", "deepseek-ai/dspark_qwen3_8b_block7"),
    "qwen3-14b": KnownPair("Qwen/Qwen3-14B", "deepseek-ai/dspark_qwen3_14b_block7"),
    "gemma4": KnownPair("google/gemma-4-12B-it", "deepseek-ai/dspark_gemma4_12b_block7"),
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
