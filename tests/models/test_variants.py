"""Drafters for which nothing was recorded, against the plain NumPy reference."""

import json
from dataclasses import dataclass, field
from functools import cache

import checkpoints as make
import mlx.core as mx
import numpy as np
import pytest
from golden_cases import DENSE, load_case
from reference import Reference

from dspark_batch.engine.engine import Engine
from dspark_batch.numerics.rules import Greedy
from dspark_batch.pair import load_pair
from dspark_batch.types import Item, Request

TOLERANCE = 1e-4
PROMPTS = [[5, 9, 33, 2, 17], [(7 * i + 3) % make.VOCAB for i in range(23)]]
ANCHORS = [11, 40]


@dataclass(frozen=True)
class Variant:
    target: dict
    drafter: dict
    stored: tuple = ()  # extra tensors: the drafter's own embedding or head
    scale: float = 1.0  # of the embedding rows
    cap: float | None = None
    sees: object = None
    anchor_predicts: bool = True
    tokens: int = make.VOCAB  # that can be drafted
    few: bool = False  # by a file beside whole tensors
    layers: dict = field(default_factory=dict)  # config of the draft layers, if it is nested


def window_of(size, *, causal, from_anchor=False, layers=(0,)):
    """What one slot sees, in the words of the packagings: see their modules."""

    def sees(layer, slot, slots, context):
        if layer not in layers:
            return np.ones(context + slots, bool)
        query, key = context + slot, np.arange(context + slots)
        near = key >= context - size if from_anchor else query - key < size
        block = key <= query if causal else np.ones(context + slots, bool)
        return np.where(key < context, near, block)

    return sees


def deepspec(target, few=None, **settings):
    scale = {"scale": make.HIDDEN**0.5} if "global_head_dim" in target else {}
    return Variant(
        target,
        make.deepspec(target, **settings),
        cap=target.get("final_logit_softcapping"),
        tokens=few or make.VOCAB,
        few=few is not None,
        **scale,
    )


def zlab(target, sees=None, **settings):
    gemma = "global_head_dim" in target
    return Variant(
        target,
        make.zlab(target, **settings),
        scale=make.HIDDEN**0.5 if gemma else 1.0,
        cap=target.get("final_logit_softcapping"),
        sees=sees,
        anchor_predicts=False,
    )


def speculators(target, inner=None, **settings):
    other = {name: settings.pop(name) for name in ("stored", "sees") if name in settings}
    config = make.speculators(target, **settings)
    config["transformer_layer_config"] |= inner or {}
    return Variant(
        target,
        config,
        anchor_predicts=config["sample_from_anchor"] is True,
        tokens=config["draft_vocab_size"],
        layers=config["transformer_layer_config"],
        **other,
    )


QWEN, GEMMA = make.qwen3(), make.gemma4()
SHARED_KV = make.gemma4(
    8,
    layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    * 2,
    num_kv_shared_layers=4,
    hidden_size_per_layer_input=6,
    use_double_wide_mlp=True,
    attention_k_eq_v=False,
    num_global_key_value_heads=None,
)
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
SEPARATE = make.gemma4(attention_k_eq_v=False, final_logit_softcapping=None)
NO_MARKOV = {"confidence_head_with_markov": False, "markov_rank": 0, "markov_head_type": ...}

VARIANTS = {
    "rnn": deepspec(QWEN, markov_head_type="rnn"),
    "rnn, no confidence": deepspec(QWEN, markov_head_type="rnn", enable_confidence_head=False),
    "gated, plain confidence": deepspec(
        QWEN, markov_head_type="gated", confidence_head_with_markov=False
    ),
    "no head, confidence": deepspec(QWEN, **NO_MARKOV),
    "no head": deepspec(QWEN, **NO_MARKOV, enable_confidence_head=False),
    "tap of the embedding": deepspec(QWEN, taps=(-1, 1)),
    "tap of the last layer": deepspec(QWEN, taps=(-1, 0, 3)),
    "untied target": deepspec(make.qwen3(tie_word_embeddings=False)),
    "tied drafter": deepspec(QWEN, tie_word_embeddings=True),
    "attention bias": deepspec(QWEN, attention_bias=True),
    "few tokens": deepspec(QWEN, few=24),
    "few tokens, tied drafter, rnn": deepspec(
        QWEN, few=30, tie_word_embeddings=True, markov_head_type="rnn"
    ),
    "few tokens, no head": deepspec(QWEN, few=16, **NO_MARKOV, enable_confidence_head=False),
    "few tokens, gemma gated": deepspec(GEMMA, few=24, markov_head_type="gated"),
    "gemma rnn": deepspec(GEMMA, markov_head_type="rnn"),
    "gemma tap of the embedding": deepspec(GEMMA, taps=(-1, 4)),
    "gemma separate values, no cap": deepspec(SEPARATE, markov_head_type="gated"),
    "gemma shared KV, per-layer inputs": deepspec(SHARED_KV, taps=(1, 6)),
    "gemma nested": deepspec(GEMMA, block_size=3),
    "z-lab": zlab(QWEN),
    "z-lab, untied target": zlab(make.qwen3(tie_word_embeddings=False), taps=(1, 2)),
    "z-lab on gemma": zlab(GEMMA, taps=(0, 4)),
    "z-lab sliding": zlab(QWEN, window_of(9, causal=True), **SLIDING),
    "z-lab sliding, not causal": zlab(QWEN, window_of(9, causal=False), **SLIDING, is_causal=False),
    "speculators": speculators(QWEN),
    "speculators, anchor predicts": speculators(QWEN, sample_from_anchor=True),
    "speculators, no key for the anchor": speculators(QWEN, sample_from_anchor=None),
    "speculators, rnn": speculators(QWEN, markov_head_type="rnn"),
    "speculators, own ends": speculators(QWEN, stored=("embed_tokens", "lm_head")),
    "speculators, reduced": speculators(QWEN, draft_vocab_size=24, stored=("lm_head",)),
    "speculators, reduced, gated, all slots": speculators(
        QWEN,
        draft_vocab_size=30,
        markov_head_type="gated",
        sample_from_anchor=True,
        stored=("lm_head",),
    ),
    "speculators, tap of the embedding": speculators(QWEN, aux=(0, 3)),
    "speculators, no head": speculators(
        QWEN, markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False
    ),
    "speculators on gemma": speculators(GEMMA),
    "speculators sliding": speculators(
        QWEN, SLIDING, sees=window_of(9, causal=True, from_anchor=True)
    ),
    "speculators sliding, not causal": speculators(
        QWEN,
        SLIDING,
        sliding_window_non_causal=True,
        sees=window_of(9, causal=False, from_anchor=True),
    ),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    @cache
    def load(name):
        variant, folder = VARIANTS[name], tmp_path_factory.mktemp("variant")
        target = make.target_weights(variant.target)
        drafter = make.drafter_weights(variant.drafter)
        for tensor in variant.stored:
            rows = make.VOCAB if tensor == "embed_tokens" else variant.tokens
            shape = {f"{tensor}.weight": (rows, make.HIDDEN)}
            drafter |= make.random_weights(shape, seed=3)
        outer = make.wrapped(variant.target) if name == "gemma nested" else variant.target
        if name == "gemma nested":
            target = make.target_weights(outer)
        make.write(folder / "target", outer, target)
        make.write(folder / "drafter", variant.drafter, drafter)
        if variant.few:
            drafter = only_few(drafter, variant.tokens, folder / "drafter")
        pair = load_pair(
            target=str(folder / "target"), drafter=str(folder / "drafter"), dtype="float32"
        )
        plain = {n.replace("model.language_model.", "model."): w for n, w in target.items()}
        return pair, plain, drafter

    return load


def only_few(drafter, tokens, directory):
    """Let a stored drafter draft every second token only; returns what is left of its tensors."""
    ids = list(range(1, 2 * tokens, 2))
    (directory / "draft_tokens.json").write_text(json.dumps(ids))
    head = drafter.get("lm_head.weight", drafter["embed_tokens.weight"])
    w2 = "markov_head.markov_w2.weight"
    rows = {"lm_head.weight": head} | ({w2: drafter[w2]} if w2 in drafter else {})
    left = drafter | {name: array[mx.array(ids)] for name, array in rows.items()}
    return left | {"d2t": mx.array(ids) - mx.arange(tokens)}


def contexts(pair):
    """Each prompt's features, and a two-slot context that holds both."""
    context, features = pair.drafter.make_cache(2, 0), []
    for slot, prompt in enumerate(PROMPTS):
        cached, row = pair.target.make_cache(1, 64), pair.drafter.make_cache(1, 64)
        _, tapped = pair.target(mx.array([prompt]), cached)
        pair.drafter.extend(row, tapped)
        context.insert([slot], row, [0], [len(prompt)])
        features.append(np.array(tapped[0]))
    context.reserve(64)
    return context, features


def draft_by_reference(variant, target, drafter, features, anchor):
    reference = Reference({**variant.drafter, **variant.layers}, drafter, sees=variant.sees)
    embedding = drafter.get("embed_tokens.weight", target["model.embed_tokens.weight"])
    own_head = target.get("lm_head.weight", target["model.embed_tokens.weight"])
    if variant.drafter.get("tie_word_embeddings") and "dflash_config" not in variant.drafter:
        own_head = embedding
    head = drafter.get("lm_head.weight", own_head)
    nested = variant.drafter.get("dflash_config", variant.drafter)
    ids = [anchor] + [nested["mask_token_id"]] * (variant.drafter["block_size"] - 1)
    rows = np.array(embedding, dtype=np.float64)[ids] * variant.scale
    hidden = reference.hidden(rows, features)
    base = hidden @ np.array(head, dtype=np.float64).T
    if variant.cap is not None:
        base = variant.cap * np.tanh(base / variant.cap)
    first = 0 if variant.anchor_predicts else 1
    reference.config.setdefault("enable_confidence_head", False)
    return reference, reference.draft(anchor, hidden, base, first=first)


@every_variant
def test_a_draft_is_the_references_draft(loaded, name):
    variant, (pair, target, drafter) = VARIANTS[name], loaded(name)
    context, features = contexts(pair)
    size = pair.drafter.block_size
    draft = pair.drafter.propose(mx.array(ANCHORS), context, size, Greedy().draft)
    assert size == variant.drafter["block_size"] - (0 if variant.anchor_predicts else 1)
    assert mx.array_equal(draft.highest, draft.logits.max(axis=(1, 2)))
    for slot, anchor in enumerate(ANCHORS):
        reference, (tokens, logits, confidence) = draft_by_reference(
            variant, target, drafter, features[slot], anchor
        )
        ids = [reference.token(i) for i in range(variant.tokens)]
        among, ours = pair.drafter.among, np.array(draft.logits[slot])
        assert draft.tokens[slot].tolist() == [reference.token(token) for token in tokens]
        assert ids == (list(range(make.VOCAB)) if among is None else among.ids.tolist())
        assert np.abs(ours - logits).max() < TOLERANCE
        assert (draft.confidence is None) == (confidence is None)
        if confidence is not None:
            assert np.abs(np.array(draft.confidence[slot]) - confidence).max() < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["gemma shared KV, per-layer inputs", "z-lab on gemma", "speculators, reduced", "few tokens"],
)
def test_speculation_changes_no_token(loaded, name):
    pair, _, _ = loaded(name)
    requests = [
        Request(Item(i, str(i), "d", f"t:{i}"), tuple(prompt), 12)
        for i, prompt in enumerate(PROMPTS)
    ]
    answers = [
        {
            c.item.index: c.token_ids
            for c in Engine(pair, slots=2, draft_length=k).generate(requests)
        }
        for k in (0, None)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "name", ["gemma shared KV, per-layer inputs", "gemma nested", "untied target"]
)
def test_the_ragged_cache_gives_the_targets_own_logits(loaded, name):
    pair, prompt = loaded(name)[0], PROMPTS[1]
    cached = pair.target.make_cache(1, 0)
    cached.reserve(64)
    parts = []
    for step in (prompt[:10], prompt[10:11], prompt[11:]):  # the window is 8
        parts.append(pair.target(mx.array([step]), cached)[0])
        cached.keep(mx.array([len(step)]))
    own = pair.target.model(mx.array([prompt]))
    assert mx.abs(mx.concatenate(parts, axis=1) - own).max().item() < TOLERANCE


def test_the_tap_of_the_embedding_is_what_the_first_layer_gets(loaded):
    for name, scale in (("tap of the embedding", 1), ("gemma tap of the embedding", 32**0.5)):
        pair, target, _ = loaded(name)
        _, features = contexts(pair)
        rows = np.array(target["model.embed_tokens.weight"])[PROMPTS[0]] * scale
        assert np.abs(features[0][:, : make.HIDDEN] - rows).max() < 1e-5


@pytest.mark.parametrize("name", DENSE)
def test_the_reference_itself_gives_the_recorded_block(name):
    case, folder = load_case(name), make.GOLDEN / name / "drafter"
    config = make.read(folder / "config.json")
    weights = mx.load(str(folder / "model.safetensors"))
    reference = Reference(config, weights)
    features, anchor = case["prefill.tap_features"], case["greedy0.rounds.draft_input_ids"][0]
    scale = config["hidden_size"] ** 0.5 if reference.gemma else 1.0
    rows = reference.weights["embed_tokens.weight"][np.array(anchor)] * scale
    hidden = reference.hidden(rows, features)
    base = hidden @ reference.weights["lm_head.weight"].T
    if cap := config.get("final_logit_softcapping"):
        base = cap * np.tanh(base / cap)
    _, logits, confidence = reference.draft(anchor[0].item(), hidden, base)

    def recorded(tensor):
        return np.array(case[f"greedy0.rounds.{tensor}"][0])

    assert np.abs(hidden - recorded("block_hidden")).max() < TOLERANCE
    assert np.abs(logits - recorded("corrected_logits")).max() < TOLERANCE
    if confidence is not None:
        assert np.abs(confidence - recorded("confidence_logits")).max() < TOLERANCE
