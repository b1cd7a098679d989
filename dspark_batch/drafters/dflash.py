"""z-lab's DFlash adapters: Qwen3 draft layers between the target's own embedding and head."""

from dspark_batch.drafters import qwen3
from dspark_batch.drafters.draft_layer import FamilySettings
from dspark_batch.drafters.drafter_config import Attention, DrafterConfig, layer_ids, mask_token
from dspark_batch.models.config_reader import ConfigReader
from dspark_batch.models.target import TargetFacts

ARCHITECTURE = "DFlashDraftModel"


def read_dflash(read: ConfigReader, target: TargetFacts) -> DrafterConfig:
    """Read the config of an adapter; the anchor's slot drafts nothing.

    Raises:
        ModelError: a key is missing, or says something that this program cannot do.

    Source:
        github.com/z-lab/dflash, dflash/model.py: keys of `dflash_config` win over outer ones.
        The adapters for Gemma 4 borrow its embedding with its scale and its head with its soft
        cap (their author in vllm#40898 and #41703).
    """
    nested = read.part("dflash_config")
    _refuse_variants(read, nested)
    block = nested if nested.get("block_size") is not None else read
    cap = nested.get("final_logit_softcapping", read.get("final_logit_softcapping"))
    settings = FamilySettings(
        layer=qwen3.read_layer(read),
        embed_scale=target.embed_scale,
        logit_softcap=target.logit_softcap if cap is None else cap,
    )
    num_layers = read.get("num_target_layers", target.num_layers)
    return DrafterConfig(
        family=qwen3.FAMILY,
        settings=settings,
        num_hidden_layers=read.count("num_hidden_layers"),
        vocab_size=read.count("vocab_size"),
        block_size=block.count("block_size", least=2),
        target_layer_ids=layer_ids(nested, "target_layer_ids", num_layers),
        mask_token_id=mask_token(nested, read.count("vocab_size")),
        num_target_layers=num_layers,
        attention=_attention(read, nested),
        anchor_predicts=False,
        own_embedding=False,
        own_head=False,
    )


def _refuse_variants(read: ConfigReader, nested: ConfigReader) -> None:
    plain = {"input_embedding_scale": 1, "output_multiplier": 1}
    absent = ("use_swa", "attention_sink_bias", "projector_type", "markov_rank")
    for key in (*plain, *absent):
        value = nested.get(key, read.get(key))
        if value is not None and value != plain.get(key, 0):
            read.refuse(f"{key} is {value!r}, and DFlash adapters with that are not known.")


def _attention(read: ConfigReader, nested: ConfigReader) -> tuple[Attention, ...]:
    """Read what each layer sees.

    Source:
        dflash/model.py: a sliding layer is causal inside the block and its window counts back from
        each slot, a full layer sees everything; `is_causal`, or vLLM's `causal`, says otherwise.
        sglang#34524 measured it for an adapter that says nothing: 5.62 tokens per round against
        5.27 with a bidirectional block.
    """
    causal = nested.get("causal", read.get("is_causal"))
    return read_attention(read, sliding_is_causal=causal is not False, full_is_causal=bool(causal))


def read_attention(
    read: ConfigReader,
    *,
    sliding_is_causal: bool,
    full_is_causal: bool = False,
    from_anchor: bool = False,
) -> tuple[Attention, ...]:
    """Read layer_types and sliding_window; see `Attention`."""
    num_layers = read.count("num_hidden_layers")
    types = read.get("layer_types", ["full_attention"] * num_layers)
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != num_layers:
        read.refuse(f"layer_types is {types}, expected full or sliding for {num_layers} layers.")
    full = Attention(causal=full_is_causal)
    if "sliding_attention" not in types:
        return (full,) * num_layers
    sliding = Attention(read.count("sliding_window"), from_anchor, sliding_is_causal)
    return tuple(sliding if kind == "sliding_attention" else full for kind in types)
