"""The registry: which target and drafter belong together."""

from dataclasses import dataclass
from importlib.resources import files

from dspark_batch.errors import UsageError

DEFAULT_FAMILY = "tiny"

_DEEPSPEC = "DeepSpec, trained on answers without thinking"


@dataclass(frozen=True, slots=True)
class KnownPair:
    """A target and the drafter that was trained for it; directories or Hub ids.

    Source:
        Ids as in the README of github.com/deepseek-ai/DeepSpec and on the Hub. Parameters follow
        from the shapes that the configs ask for; those of a multimodal target are its text
        model's, which is what is loaded.
    """

    target: str
    drafter: str
    target_params: int
    drafter_params: int  # the copies of the target's embedding and head included
    shared_params: int  # of these, the copies
    source: str  # of the drafter
    thinking: bool = False  # whether the drafter was trained on answers with thinking
    bundled: bool = False  # comes with this package

    @property
    def memory_bytes(self) -> int:
        """Bytes of both models' weights as they are stored, the copies held once."""
        return 2 * (self.target_params + self.drafter_params - self.shared_params)


def _bundled(part: str) -> str:
    return str(files("dspark_batch.tiny") / part)


KNOWN_PAIRS = {
    "tiny": KnownPair(
        _bundled("target"),
        _bundled("drafter"),
        target_params=6_394_688,
        drafter_params=2_963_969,
        shared_params=983_040,
        source="in this package, for demonstrations and tests",
        bundled=True,
    ),
    "qwen3": KnownPair(
        "Qwen/Qwen3-4B",
        "deepseek-ai/dspark_qwen3_4b_block7",
        target_params=4_022_468_096,
        drafter_params=1_393_133_569,
        shared_params=777_912_320,
        source=_DEEPSPEC,
    ),
    "qwen3-8b": KnownPair(
        "Qwen/Qwen3-8B",
        "deepseek-ai/dspark_qwen3_8b_block7",
        target_params=8_190_735_360,
        drafter_params=2_371_081_729,
        shared_params=1_244_659_712,
        source=_DEEPSPEC,
    ),
    "qwen3-14b": KnownPair(
        "Qwen/Qwen3-14B",
        "deepseek-ai/dspark_qwen3_14b_block7",
        target_params=14_768_307_200,
        drafter_params=3_416_263_169,
        shared_params=1_555_824_640,
        source=_DEEPSPEC,
    ),
    "gemma4": KnownPair(
        "google/gemma-4-12B-it",
        "deepseek-ai/dspark_gemma4_12b_block7",
        target_params=11_907_350_320,
        drafter_params=3_430_444_550,
        shared_params=2_013_265_920,
        source=_DEEPSPEC,
    ),
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
