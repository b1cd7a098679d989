"""Tells drafter packagings apart, and refuses what is none of them in one sentence."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from dspark_batch.drafters import dflash, speculators
from dspark_batch.drafters.drafter_config import FAMILIES, DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.drafters.few_tokens import DRAFT_TOKENS, HEADS, draft_tokens, reduced
from dspark_batch.errors import ModelError
from dspark_batch.models.checkpoint import load_strictly, read_config, read_weights
from dspark_batch.models.config_reader import ConfigReader
from dspark_batch.models.quantisation import prepare_as_stored
from dspark_batch.models.target import TargetEnds, TargetFacts

Weights = Mapping[str, mx.array]

# What a name stands for, in configs that nothing here can use; the first that is found counts.
_OTHERS = {
    "dflash2": "a DFlash 2 drafter (convolutions and a candidate selector)",
    "eagle": "an EAGLE drafter (EAGLE-3 and its kin draft token by token)",
    "medusa": "a Medusa head",
    "mtp": "a multi-token-prediction head",
    "domino": "a Domino drafter",
}
_DFLASH2_KEYS = ("selector_rank", "selector_top_k", "conv_kernel_size")
_WHOLE_MODELS = ("ForCausalLM", "ForConditionalGeneration")
_EMBEDDED_KEYS = ("dspark_block_size", "dspark_config", "markov_rank", "num_nextn_predict_layers")


def load_drafter(
    directory: Path, target: TargetFacts, ends: TargetEnds, *, reduces: bool = True
) -> DSparkDrafter:
    """Load a drafter for a target, whatever packaging it comes in.

    Args:
        directory: the checkpoint.
        target: what the drafter must fit.
        ends: the target's embedding and head, for drafters without their own.
        reduces: let a drafter of DeepSpec's packaging draft only the tokens that its file names.

    Raises:
        ModelError: it is missing, damaged, unsupported, or does not fit; one sentence says why.
    """
    read = ConfigReader(read_config(directory), str(directory / "config.json"))
    config, weights = _read(read, directory, target, reduces)
    _check_fit(read, config, target)
    try:
        drafter = DSparkDrafter(config, ends)
    except (ValueError, KeyError) as error:  # mlx-lm's position encodings
        read.refuse(f"the rope settings are not known to mlx-lm ({error}).")
    prepare_as_stored(drafter, read, weights)
    load_strictly(drafter, weights, directory)
    return drafter


def _read(
    read: ConfigReader, directory: Path, target: TargetFacts, reduces: bool
) -> tuple[DrafterConfig, Weights]:
    """Recognise the packaging and read it as such."""
    architecture = _architecture(read)
    if reason := _why_not(read, architecture):
        read.refuse(f"this is {reason}, expected a DSpark or DFlash drafter.")
    if read.get("speculators_model_type") is not None:
        return speculators.read_speculators(read, read_weights(directory), target)
    if architecture == dflash.ARCHITECTURE:
        return dflash.read_dflash(read, target), read_weights(directory)
    config = DrafterConfig.from_dict(read.content, read.where)
    stored = read_weights(directory)
    weights = _without_tied_head(read, stored) if config.tied else stored
    ids = draft_tokens(directory, config.vocab_size) if reduces else None
    if ids is None:
        return config, weights
    _check_rows(config, weights, directory)
    return reduced(config, weights, ids)


def _check_rows(config: DrafterConfig, weights: Weights, directory: Path) -> None:
    """See that heads are whole, before rows are taken out of them."""
    for name, array in weights.items():
        if name.startswith(HEADS) and array.shape[:1] != (config.vocab_size,):
            raise ModelError(
                f"{directory}: tensor {name} has shape {array.shape}, expected a row for each of "
                f"{config.vocab_size} tokens. Download the checkpoint again."
            )
    if "d2t" in weights:
        raise ModelError(
            f"{directory}: has a tensor d2t and a {DRAFT_TOKENS}, which both say what is drafted. "
            "Delete the file, or name another checkpoint."
        )


def _architecture(read: ConfigReader) -> str:
    names = read.required("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        read.refuse(f"architectures is {names!r}, expected a list with a class name.")
    return names[0]


def _why_not(read: ConfigReader, architecture: str) -> str | None:
    """Say what an unsupported checkpoint is; None if it is a known packaging."""
    kind = read.get("speculators_model_type")
    nested = read.get("dflash_config", {})
    if any(read.get(key, nested.get(key)) for key in _DFLASH2_KEYS):
        return _OTHERS["dflash2"]
    name = str(kind or architecture)
    for part, other in _OTHERS.items():
        if part in name.lower():
            return other
    if kind is not None:
        return None if kind == "dspark" else f"a speculators drafter of type {kind}"
    if architecture in FAMILIES or architecture == dflash.ARCHITECTURE:
        return None
    if architecture.endswith(_WHOLE_MODELS):
        inside = any(read.get(key) is not None for key in _EMBEDDED_KEYS)
        return f"a whole model ({architecture})" + (" with a drafter inside it" if inside else "")
    known = ", ".join([*FAMILIES, dflash.ARCHITECTURE])
    return f"{architecture} (known are {known}, and speculators' dspark)"


def _without_tied_head(read: ConfigReader, weights: Weights) -> Weights:
    """Drop a stored copy of the head that the config ties to the embedding."""
    stored, embedding = weights.get("lm_head.weight"), weights.get("embed_tokens.weight")
    if stored is None or embedding is None:
        return weights
    if stored.shape != embedding.shape or not mx.array_equal(stored, embedding):
        read.refuse("tie_word_embeddings is true, but lm_head.weight is not the embedding.")
    return {name: array for name, array in weights.items() if name != "lm_head.weight"}


def _check_fit(read: ConfigReader, drafter: DrafterConfig, target: TargetFacts) -> None:
    pairs = {
        "hidden_size": (drafter.hidden_size, target.hidden_size),
        "vocab_size": (drafter.vocab_size, target.vocab_size),
        "num_target_layers": (drafter.num_target_layers, target.num_layers),
    }
    for key, (mine, its) in pairs.items():
        if mine != its:
            raise ModelError(
                f"{read.where}: this drafter is for a target with {key} {mine}, and the target has "
                f"{its}. Name the drafter that was trained for this target."
            )
