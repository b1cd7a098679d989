"""What a drafter checkpoint's config.json says, checked key by key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dspark_batch.drafters import gemma4, qwen3
from dspark_batch.drafters.draft_layer import Family, FamilySettings, LayerConfig
from dspark_batch.drafters.heads import MARKOV_HEADS
from dspark_batch.models.config_reader import ConfigReader
from dspark_batch.models.taps import EMBEDDING

FAMILIES = {family.architecture: family for family in (qwen3.FAMILY, gemma4.FAMILY)}


@dataclass(frozen=True, slots=True)
class Attention:
    """Which keys the slots of a block see in one layer.

    The context is limited to a window; the block is seen whole or only up to the own slot.
    """

    window: int | None = None  # positions; None: all context
    from_anchor: bool = False  # the window counts back from the anchor, else from each slot
    causal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """The settings of a drafter, whatever packaging they came in."""

    family: Family
    settings: FamilySettings
    num_hidden_layers: int
    vocab_size: int  # the target's
    block_size: int  # slots of a block: the anchor and its masks
    target_layer_ids: tuple[int, ...]  # the tapped layers, 0-based; EMBEDDING for the embedding
    mask_token_id: int
    num_target_layers: int
    markov_rank: int = 0  # 0: no Markov head, all positions drafted at once
    markov_head_type: str | None = None  # "vanilla", "gated", "rnn"; None without a Markov head
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    attention: tuple[Attention, ...] = ()  # by layer; empty: all see everything
    anchor_predicts: bool = True  # False: the anchor's slot drafts nothing
    own_embedding: bool = True  # False: the target's
    own_head: bool = True  # False: the target's, or with `tied` the drafter's embedding
    tied: bool = False
    draft_vocab_size: int | None = None  # None: the target's vocabulary

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "config.json") -> "DrafterConfig":
        """Read the parsed config.json of a DeepSpec drafter.

        Args:
            config: the file's content.
            where: the file's name, for messages.

        Raises:
            ModelError: a key is missing, or says something that this program cannot do.

        Source:
            DeepSpec's checkpoints; a default only where the reference code has one.
        """
        read = ConfigReader(config, where)
        family = FAMILIES.get(read.required("architectures")[0])
        if family is None:
            read.refuse(f"architectures is {read.get('architectures')}, expected {[*FAMILIES]}.")
        if set(read.get("layer_types", ())) - {"full_attention"}:
            read.refuse(f"layer_types is {read.get('layer_types')}, expected full_attention only.")
        num_layers, tied = read.count("num_target_layers"), read.get("tie_word_embeddings", False)
        return cls(
            family=family,
            settings=family.read(read),
            num_hidden_layers=read.count("num_hidden_layers"),
            vocab_size=read.count("vocab_size"),
            block_size=read.count("block_size"),
            target_layer_ids=layer_ids(read, "target_layer_ids", num_layers),
            mask_token_id=mask_token(read, read.count("vocab_size")),
            num_target_layers=num_layers,
            own_head=not tied,
            tied=tied,
            **read_heads(read),
        )

    @property
    def layer(self) -> LayerConfig:
        """The sizes of every draft layer."""
        return self.settings.layer

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream, the target's and the drafter's."""
        return self.layer.hidden_size

    @property
    def num_drafts(self) -> int:
        """Tokens that one block drafts."""
        return self.block_size if self.anchor_predicts else self.block_size - 1


def layer_ids(read: ConfigReader, key: str, num_layers: int, shift: int = 0) -> tuple[int, ...]:
    """Read which target layers are tapped.

    Args:
        read: the config.
        key: holds the list.
        num_layers: of the target.
        shift: what to subtract, where a packaging counts otherwise than DeepSpec.
    """
    found = read.required(key)
    whole = isinstance(found, Sequence) and all(type(i) is int for i in found)
    ids = [i - shift for i in found] if whole else []
    rising = all(a < b for a, b in pairwise(ids))
    if not (ids and rising and ids[0] >= EMBEDDING and ids[-1] < num_layers):
        read.refuse(
            f"{key} is {found}, expected rising layer numbers "
            f"from {EMBEDDING + shift} (the embedding) to {num_layers - 1 + shift}."
        )
    return tuple(ids)


def mask_token(read: ConfigReader, vocab_size: int) -> int:
    """Read the id that the slots behind the anchor are filled with."""
    token = read.count("mask_token_id", least=0)
    if token >= vocab_size:
        read.refuse(f"mask_token_id is {token}, expected less than vocab_size {vocab_size}.")
    return token


def read_heads(read: ConfigReader) -> dict[str, Any]:
    """Read the heads; their second keys must be there exactly if the first asks for them."""
    rank, confident = read.count("markov_rank", least=0), read.flag("enable_confidence_head")
    with_markov = read.flag("confidence_head_with_markov") if confident else False
    if with_markov and not rank:
        read.refuse("confidence_head_with_markov is true, expected false because markov_rank is 0.")
    return {
        "markov_rank": rank,
        "markov_head_type": read.one_of("markov_head_type", *MARKOV_HEADS) if rank else None,
        "enable_confidence_head": confident,
        "confidence_head_with_markov": with_markov,
    }
