"""The configs of the eight released drafters load, from every shape of checkpoint and cache."""

import os
import subprocess
import sys

import checkpoints as make
import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from dspark_batch.engine.engine import Engine
from dspark_batch.models.load import load_pair
from dspark_batch.types import Item, Request

EIGHT = [(size, twin) for size in make.REAL for twin in ("dspark", "dflash")]


def real_configs(size, twin):
    layers, taps = make.REAL[size]
    target = make.gemma4(layers) if size.startswith("gemma") else make.qwen3(layers)
    drafter = make.deepspec(target, taps=taps, layers=5)
    return target, make.without_markov(drafter) if twin == "dflash" else drafter


def computed(pair):
    """What target and drafter make of a few tokens, the drafter without context."""
    tokens = mx.array([[5, 9, 33, 2]])
    drafter = pair.drafter
    caches = [KVCache() for _ in range(drafter.num_layers)]
    block = drafter.block_hidden(tokens, caches, mx.array([[3]]), None)
    return pair.target.model(tokens), drafter.base_logits(block)


def answer(pair):
    request = Request(Item(0, "0", "d", "t:1"), (5, 9, 33, 2), 6)
    (completion,) = Engine(pair).generate([request])
    return completion.token_ids


@pytest.mark.parametrize(("size", "twin"), EIGHT)
def test_a_released_config_loads_in_every_shape_and_computes_the_same(tmp_path, size, twin):
    target, drafter = real_configs(size, twin)
    weights = make.target_weights(target), make.drafter_weights(drafter)
    five, four = tmp_path / "five", tmp_path / "four"
    for folder, older, shards in ((five, False, 1), (four, True, 3)):
        for part, config, tensors in zip(
            ("target", "drafter"), (target, drafter), weights, strict=True
        ):
            config = make.as_transformers_4(config) if older else config
            make.write(folder / part, config, tensors, shards=shards, dtype=mx.bfloat16)
    pairs = [
        load_pair(target=str(folder / "target"), drafter=str(folder / "drafter"), dtype="float32")
        for folder in (five, four)
    ]
    assert pairs[0].drafter.num_layers == 5
    assert list(pairs[0].drafter.config.target_layer_ids) == make.REAL[size][1]
    assert pairs[0].drafter.has_confidence == (twin == "dspark")
    for ours, same in zip(*map(computed, pairs), strict=True):
        assert mx.array_equal(ours, same)


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified"])
def test_a_multimodal_target_is_its_text_model(tmp_path, model_type):
    text = make.gemma4()
    outer = make.wrapped(text, model_type)
    plain = make.target_weights(text)
    make.write(tmp_path / "text", text, plain)
    nested = {n.replace("model.", "model.language_model.", 1): w for n, w in plain.items()}
    make.write(tmp_path / "outer", outer, nested)
    make.write_drafter(tmp_path / "drafter", make.deepspec(text))
    pairs = [
        load_pair(target=str(tmp_path / part), drafter=str(tmp_path / "drafter"), dtype="float32")
        for part in ("text", "outer")
    ]
    assert pairs[1].config.stop_ids == {1, 7}
    assert pairs[1].config.context_length == text["max_position_embeddings"]
    assert answer(pairs[0]) == answer(pairs[1])


def test_the_unified_text_type_is_the_text_model(tmp_path):
    text = make.gemma4(model_type="gemma4_unified_text")
    make.write(tmp_path / "target", text, make.target_weights(make.gemma4()))
    make.write_drafter(tmp_path / "drafter", make.deepspec(text))
    pair = load_pair(
        target=str(tmp_path / "target"), drafter=str(tmp_path / "drafter"), dtype="float32"
    )
    assert len(answer(pair)) == 6


def hub_cache(root, name, source):
    """Put a checkpoint where the Hub's client keeps it: a snapshot of links to blobs."""
    repo, revision = (
        root / f"models--{name.replace('/', '--')}",
        "0123456789abcdef" * 2 + "01234567",
    )
    snapshot = repo / "snapshots" / revision
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for file in source.iterdir():
        (repo / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(repo / "blobs" / file.name, snapshot))


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path):
    target = make.qwen3()
    make.write_target(tmp_path / "target", target, shards=2)
    make.write_drafter(tmp_path / "drafter", make.deepspec(target))
    hub_cache(tmp_path / "hub", "somebody/target", tmp_path / "target")
    hub_cache(tmp_path / "hub", "somebody/drafter", tmp_path / "drafter")
    script = (
        "from dspark_batch.models.load import load_pair\n"
        "pair = load_pair(target='somebody/target', drafter='somebody/drafter', dtype='float32')\n"
        "print(pair.drafter.block_size)\n"
        "try:\n"
        "    load_pair(target='somebody/else')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    block_size, refusal = done.stdout.splitlines()
    assert block_size == "7"
    assert refusal.startswith("ModelError somebody/else: not in the local cache")


def test_a_drafter_of_a_directory_and_its_digest_name_the_same_files(tmp_path):
    target = make.write_target(tmp_path / "target", make.qwen3())
    drafter = make.write_drafter(tmp_path / "drafter", make.deepspec(make.qwen3()))
    plain = load_pair(target=str(target), dtype="float32")
    pair = load_pair(target=str(target), drafter=str(drafter), dtype="float32")
    assert plain.config.identity["drafter"] is None
    assert pair.config.identity["drafter"] is not None
    assert pair.config.identity["target"] == plain.config.identity["target"]
