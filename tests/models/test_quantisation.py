"""The released configs load by their names, quantised and not; what a pair shares."""

import checkpoints as make
import mlx.core as mx
import mlx.nn as nn
import pytest
from fake_hub import point_client_at
from grids import grid
from loaded import answer, computed
from mlx.utils import tree_flatten

from dspark_batch.errors import ModelError, UsageError
from dspark_batch.models import quantisation
from dspark_batch.models.pairs import KNOWN_PAIRS
from dspark_batch.pair import load_pair

EIGHT = grid(list(make.REAL), ["dspark", "dflash"])
# Rows of whole groups, so that quantising finds something to do.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "head_dim": 16}
FAMILY = {
    "qwen3_4b": "qwen3",
    "qwen3_8b": "qwen3-8b",
    "qwen3_14b": "qwen3-14b",
    "gemma4_12b": "gemma4",
}


def real_configs(size, twin):
    layers, taps = make.REAL[size]
    target = wide(make.gemma4(layers) if size.startswith("gemma") else make.qwen3(layers))
    drafter = wide(make.deepspec(target, taps=taps, layers=5))
    return target, make.without_markov(drafter) if twin == "dflash" else drafter


def wide(config):
    inner = config | WIDE | ({"markov_rank": 64} if config.get("markov_rank") else {})
    return inner | ({"mask_token_id": 127} if "mask_token_id" in config else {})


def with_copies(drafter, target):
    """Real drafters store the target's embedding and head once more."""
    embedding = target["model.embed_tokens.weight"]
    head = target.get("lm_head.weight", embedding)
    return drafter | {"embed_tokens.weight": embedding, "lm_head.weight": head}


def quantised(module):
    return {path for path, layer in module.named_modules() if hasattr(layer, "bits")}


def matrices(module):
    return {
        path
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Embedding) and path != "confidence_head.proj"
    }


def down_proj(module):
    return module.layers[4].mlp.down_proj.weight


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Write a released pair: one file by transformers 5, and sharded by 4 in the Hub's cache."""

    def write(size, twin):
        target, drafter = real_configs(size, twin)
        weights = make.target_weights(target)
        copies = with_copies(make.drafter_weights(drafter), weights)
        known = KNOWN_PAIRS[FAMILY[size]]
        drafter_id = known.drafter.replace("dspark", twin)
        for name, config, tensors in (
            (known.target, target, weights),
            (drafter_id, drafter, copies),
        ):
            make.write(tmp_path / name, config, tensors, dtype=mx.bfloat16)
            older = make.as_transformers_4(config)
            make.write(tmp_path / "4" / name, older, tensors, shards=3, dtype=mx.bfloat16)
            make.hub_cache(tmp_path / "hub", name, tmp_path / "4" / name)
        point_client_at(monkeypatch, tmp_path / "hub")
        return known.target, drafter_id

    return write


@pytest.mark.parametrize(("size", "twin"), EIGHT)
def test_a_released_pair_loads_by_its_names_quantised_and_not(tmp_path, released, size, twin):
    target_id, drafter_id = released(size, twin)
    assert drafter_id == f"deepseek-ai/{twin}_{size}_block7"
    folders = {"target": str(tmp_path / target_id), "drafter": str(tmp_path / drafter_id)}
    named = {"family": FAMILY[size], "drafter": drafter_id}
    plain, same = (load_pair(**names, dtype="float32") for names in (folders, named))
    small = load_pair(**named, dtype="float32", drafter_bits=4, target_bits=8)

    assert plain.drafter.num_layers == 5
    assert list(plain.drafter.config.target_layer_ids) == make.REAL[size][1]
    assert plain.drafter.has_confidence == (twin == "dspark")
    assert same.config.identity["target_source"] == f"{target_id}@{make.COMMIT}"
    assert same.config.identity["drafter_source"] == f"{drafter_id}@{make.COMMIT}"
    assert not quantised(plain.target.model) | quantised(plain.drafter)
    assert own(plain) == set()
    outputs = computed(plain)
    for ours, right in zip(computed(same), outputs, strict=True):
        assert mx.array_equal(ours, right)

    assert small.config.identity["target_bits"] == "8 bits/64 affine"
    assert small.config.identity["drafter_bits"] == "4 bits/64 affine"
    assert quantised(small.drafter) == matrices(plain.drafter) | {"embed_tokens", "lm_head"}
    assert quantised(small.target.model) == matrices(plain.target.model)
    for packed, right in (
        (small.drafter.layers[4].mlp.down_proj, mx.quantize(down_proj(plain.drafter), 64, 4)),
        (
            small.target.model.layers[4].mlp.down_proj,
            mx.quantize(down_proj(plain.target.model), 64, 8),
        ),
    ):
        for name, expected in zip(("weight", "scales", "biases"), right, strict=True):
            assert mx.array_equal(packed[name], expected)
    for ours, exact in zip(computed(small), outputs, strict=True):
        assert not mx.array_equal(ours, exact)
        assert mx.isfinite(ours).all().item()


@pytest.fixture(scope="module")
def configs():
    target = wide(make.qwen3(tie_word_embeddings=False))
    return target, wide(make.deepspec(target))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, configs):
    """A target, and drafters that store its embedding and head, or one of them otherwise."""
    root = tmp_path_factory.mktemp("pairs")
    target, drafter = map(dict, configs)
    weights = make.target_weights(target)
    copies = with_copies(make.drafter_weights(drafter), weights)
    make.write(root / "target", target, weights)
    make.write(root / "copies", drafter, copies)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        changed = mx.array(copies[name])
        changed[7, 3] += 1e-6  # one value of one row
        make.write(root / name, drafter, copies | {name: changed})
    return root


def load(folder, drafter="copies", target="target", dtype="float32", **bits):
    return load_pair(
        target=str(folder / target), drafter=str(folder / drafter), dtype=dtype, **bits
    )


def own(pair):
    return {name for name in ("embed_tokens", "lm_head") if name in pair.drafter}


def test_copies_are_dropped_and_not_one_bit_changes(folder, monkeypatch):
    shared = load(folder)
    assert own(load(folder, drafter_bits=4)) == set()  # shared first, quantised then
    monkeypatch.setattr("dspark_batch.pair.share_ends", lambda drafter, model: None)
    apart = load(folder)
    assert own(shared) == set()
    assert own(apart) == {"embed_tokens", "lm_head"}
    for ours, theirs in zip(computed(shared), computed(apart), strict=True):
        assert mx.array_equal(ours, theirs)
    sizes = [
        sum(array.nbytes for _, array in tree_flatten(pair.drafter.parameters()))
        for pair in (shared, apart)
    ]
    assert sizes[1] - sizes[0] == 2 * 128 * 64 * 4  # both matrices in float32
    assert shared.drafter._ends.embed is shared.target.model.model.embed_tokens


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_copy_that_differs_in_one_value_is_kept(folder, name):
    assert own(load(folder, drafter=f"{name}.weight")) == {name}
    # In bfloat16 the small difference is rounded away, and equal bits are equal logits.
    assert own(load(folder, drafter=f"{name}.weight", dtype="bfloat16")) <= {name}


def test_a_quantised_target_shares_nothing(folder):
    assert own(load(folder, target_bits=8)) == {"embed_tokens", "lm_head"}


def test_a_head_tied_to_its_own_embedding_is_kept(folder, configs):
    tied = configs[1] | {"tie_word_embeddings": True}
    weights = with_copies(make.drafter_weights(configs[1]), make.target_weights(configs[0]))
    weights.pop("lm_head.weight")
    make.write(folder / "tied", tied, weights)
    assert own(load(folder, drafter="tied")) == {"embed_tokens"}


def test_rows_that_are_no_whole_groups_stay(tmp_path):
    target = make.write_target(tmp_path / "target", make.qwen3())
    drafter = make.write_drafter(tmp_path / "drafter", make.deepspec(make.qwen3()))
    pair = load_pair(target=str(target), drafter=str(drafter), dtype="float32", drafter_bits=4)
    # hidden 32, MLP 48: only what reads the four heads of 16 has rows of 64
    assert quantised(pair.drafter) == {f"layers.{i}.self_attn.o_proj" for i in range(2)} | {"fc"}


@pytest.mark.parametrize(
    ("on_apple", "small_bytes", "bits"),
    [
        (True, 0, "4 bits/64 affine"),
        (True, 256 << 20, None),
        (False, 0, None),
    ],
)
def test_auto_is_4_bits_for_large_drafters_on_an_apple_gpu(
    folder, monkeypatch, on_apple, small_bytes, bits
):
    monkeypatch.setattr(quantisation, "_on_apple_gpu", lambda: on_apple)
    monkeypatch.setattr(quantisation, "_SMALL_BYTES", small_bytes)
    assert load(folder).config.identity["drafter_bits"] == bits
    assert load(folder, drafter_bits=None).config.identity["drafter_bits"] is None


@pytest.mark.parametrize("bits", [{"drafter_bits": 7}, {"target_bits": 1}, {"target_bits": 16}])
def test_bits_that_mlx_does_not_know_are_refused(folder, bits):
    with pytest.raises(UsageError, match=r"-bits is \d+, expected one of 2, 3, 4, 5, 6, 8"):
        load(folder, **bits)


def stored_quantised(root, name, module, config, bits=8):
    weights = dict(tree_flatten(module.parameters()))
    settings = {"group_size": 64, "bits": bits, "mode": "affine"}
    make.write(root / name, config | {"quantization": settings}, weights)


def test_a_quantised_checkpoint_loads_as_it_is_stored(folder, configs, monkeypatch):
    before = load(folder, target_bits=8, drafter_bits=8)
    stored_quantised(folder, "target8", before.target.model, configs[0])
    stored_quantised(folder, "drafter8", before.drafter, configs[1])
    pair = load(folder, "drafter8", "target8", drafter_bits=8, target_bits=8)
    assert pair.config.identity["target_bits"] == "8 bits/64 affine"
    assert pair.config.identity["drafter_bits"] == "8 bits/64 affine"
    for ours, same in zip(computed(pair), computed(before), strict=True):
        assert mx.array_equal(ours, same)
    assert own(pair) == {"embed_tokens", "lm_head"}  # equal integers are no equal numbers
    assert len(answer(pair)) == 6
    monkeypatch.setattr(quantisation, "_on_apple_gpu", lambda: True)
    monkeypatch.setattr(quantisation, "_SMALL_BYTES", 0)
    automatic = load(folder, "drafter8", "target8")
    assert automatic.config.identity["drafter_bits"] == "8 bits/64 affine"
    with pytest.raises(ModelError, match="stored with 8 bits/64 affine, and --target-bits asks"):
        load(folder, "drafter8", "target8", target_bits=4)
    with pytest.raises(ModelError, match="stored with 8 bits/64 affine, and --drafter-bits asks"):
        load(folder, "drafter8", "target8", drafter_bits=4)


@pytest.mark.parametrize("part", ["target", "drafter"])
def test_a_weight_that_is_no_number_is_named_before_it_is_quantised(folder, configs, part):
    config = configs[part == "drafter"]
    weights = make.target_weights(config) if part == "target" else make.drafter_weights(config)
    name = {"target": "model.layers.1.mlp.up_proj.weight", "drafter": "fc.weight"}[part]
    spoiled = mx.array(weights[name])
    spoiled[5, 9] = mx.nan
    make.write(folder / f"nan-{part}", config, weights | {name: spoiled})
    parts = {"target": "target", "drafter": "copies"} | {part: f"nan-{part}"}
    with pytest.raises(ModelError, match=f"tensor {name} holds NaN"):
        load(folder, parts["drafter"], parts["target"], target_bits=4, drafter_bits=4)
