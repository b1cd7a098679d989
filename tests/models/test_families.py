"""Every family of mlx-lm is decoded as mlx-lm decodes it, or refused in a sentence."""

import gc
import re
from pathlib import Path

import checkpoints as make
import families
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from dspark_batch import pair as load
from dspark_batch.cli.main import main
from dspark_batch.engine import conformance as conforming
from dspark_batch.engine.conformance import conformance
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.shapes import Shapes
from dspark_batch.errors import ModelError
from dspark_batch.models import attention as attending
from dspark_batch.pair import load_pair, load_reading
from dspark_batch.types import Item, Request

PROMPTS = [
    [(7919 * number + 104729 * place) % families.VOCAB for place in range(length)]
    for number, length in enumerate((3, 21, 11, 5, 26, 9, 17))
]
NUM_TOKENS = 6
NAMES = families.often(families.RIGHT)


@pytest.fixture(autouse=True)
def small_room(monkeypatch, small_blocks):
    monkeypatch.setattr(conforming, "BLOCK", 32)


def on_the_page(verdict):
    """The model types whose line in the table of docs/models.md has a verdict."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    lines = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*) \|$", page, re.MULTILINE)
    return {
        kind for kinds, said in lines if said.startswith(verdict) for kind in kinds.split("`")[1::2]
    }


def test_every_line_of_the_page_is_kept_by_a_test():
    assert {*families.RIGHT} >= families.OFTEN
    kinds = [
        {c["model_type"] for c in table.values()} for table in (families.RIGHT, families.REFUSED)
    ]
    assert on_the_page("right") - on_the_page("right without") == kinds[0]
    assert on_the_page("right without") == {*families.UNTAPPED}
    assert on_the_page("refused, by `check` too") == kinds[1] | {"olmo"}
    assert on_the_page("refused when a run begins") == {*families.REFUSED_BY_RUNNING}


def whole_weights(config):
    """Random tensors under mlx-lm's own names, of multimodal wrappers too."""
    model = make.model_of(config)
    return make.random_weights({n: a.shape for n, a in make.tree_flatten(model.parameters())}, 1)


def by_mlx_lm(directory):
    """The tokens of mlx-lm alone, one prompt at a time."""
    model, _ = load_model(directory)
    return [
        [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=NUM_TOKENS)]
        for ids in PROMPTS
    ]


def by_us(pair, slots, shapes, prompts=PROMPTS):
    requests = [
        Request(Item(number, str(number), f"digest-{number}", "test"), tuple(ids), NUM_TOKENS)
        for number, ids in enumerate(prompts)
    ]
    done = Engine(pair, slots=slots, shapes=shapes).generate(requests)
    tokens = {each.item.index: list(each.token_ids) for each in done}
    return [tokens[number] for number in range(len(prompts))]


def random_drafter(directory):
    """A DSpark drafter with Qwen3 layers, which have norms and positions of their own."""
    config = make.deepspec(make.qwen3(families.LAYERS), layers=1, block_size=4)
    return make.write_drafter(directory, config)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_decoded_as_by_mlx_lm(tmp_path, name):
    target = make.write_target(tmp_path / "target", families.RIGHT[name])
    drafter = random_drafter(tmp_path / "drafter")
    expected = by_mlx_lm(target)
    assert len({token for ids in expected for token in ids}) > 5  # it is not for nothing
    for used, all_slots in ((None, (1, 7)), (str(drafter), (2, 3))):
        pair = load_pair(target=str(target), drafter=used, dtype="float32")
        shapes = conformance(pair.target).shapes
        assert shapes == Shapes(packed=name not in families.RECURRENT)
        for slots in all_slots:
            some = PROMPTS[: 2 * slots]
            assert by_us(pair, slots, shapes, some) == expected[: len(some)], (slots, used)


@pytest.mark.parametrize("name", NAMES)
def test_the_scale_of_the_embedding_is_the_one_that_the_first_layer_gets(tmp_path, name):
    target = make.write_target(tmp_path / "target", families.RIGHT[name])
    drafter = make.deepspec(make.qwen3(families.LAYERS), taps=(-1, 0))
    drafter = make.write_drafter(tmp_path / "drafter", drafter)
    target = load_pair(target=str(target), drafter=str(drafter), dtype="float32").target
    tokens = mx.array([[5, 9]])
    _, features = target.by_itself(tokens)
    rows = load.ends_of(target.model).embed(tokens) * target.facts.embed_scale
    if name not in ("gpt2", "nanochat"):  # which add positions, and normalise
        assert mx.allclose(features[..., : families.HIDDEN], rows, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", families.REFUSED)
def test_what_a_config_shows_is_refused_by_a_run_and_without_weights(tmp_path, name):
    config = families.REFUSED[name]
    target = make.write(tmp_path / "target", config, whole_weights(config))
    with pytest.raises(ModelError, match="a target of type ") as by_run:
        load_pair(target=str(target), dtype="float32")
    with pytest.raises(ModelError) as by_check:
        load_reading(target=str(target))
    assert str(by_check.value) == str(by_run.value)


@pytest.mark.parametrize("name", families.REFUSED_BY_RUNNING)
def test_what_only_a_pass_shows_is_refused_when_a_run_begins(tmp_path, name):
    target = make.write_target(tmp_path / "target", families.REFUSED_BY_RUNNING[name])
    pair = load_pair(target=str(target), dtype="float32")
    with pytest.raises(ModelError, match="cannot run over slots of different lengths"):
        conformance(pair.target)


@pytest.mark.parametrize("name", families.UNTAPPED)
def test_a_family_that_runs_parts_of_layers_goes_without_a_drafter(tmp_path, name):
    target = make.write_target(tmp_path / "target", families.UNTAPPED[name])
    pair = load_pair(target=str(target), dtype="float32")
    shapes = conformance(pair.target).shapes
    assert by_us(pair, 3, shapes) == by_mlx_lm(target)
    drafter = random_drafter(tmp_path / "drafter")
    with pytest.raises(ModelError, match=r"its code runs parts of layers .*Leave --drafter out"):
        load_pair(target=str(target), drafter=str(drafter), dtype="float32")


def test_check_says_so_before_the_night(tmp_path, capsys):
    config = families.REFUSED["mamba"]
    target = make.write(tmp_path / "target", config, whole_weights(config))
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    paths = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--target", str(target)]
    said = []
    for command in ("check", "run"):
        assert main([command, *paths]) == 2
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert "a target of type mamba keeps ArraysCache" in said[0]
    assert said[0] == said[1]


def test_a_family_that_needs_a_package_more_is_refused(tmp_path):
    target = make.write(tmp_path / "target", families.family("olmo"), {"a": mx.zeros(1)})
    with pytest.raises(ModelError, match="mlx-lm cannot load it as a target"):
        load_pair(target=str(target))


def test_a_config_without_a_context_length_is_refused(tmp_path):
    config = families.family("gemma", max_position_embeddings=...)
    target = make.write_target(tmp_path / "target", config)
    with pytest.raises(ModelError, match=r"config\.json has no max_position_embeddings"):
        load_pair(target=str(target))
    with pytest.raises(ModelError, match=r"config\.json has no max_position_embeddings"):
        load_reading(target=str(target))


# Planted: families that are wrong in ways that no config shows.


def planted(tmp_path, attention):
    """A llama whose attention modules are of another class."""
    target = make.write_target(tmp_path / "target", families.RIGHT["llama"])
    model = load_pair(target=str(target), dtype="float32").target
    for layer in model.model.layers:
        plain = type(layer.self_attn)
        layer.self_attn.__class__ = type("Planted", (attention, plain), {})
    return model


class SeesAll(nn.Module):
    """Its mask lets a token see the whole buffer, wherever its slot ends."""

    def __call__(self, x, mask, cache):
        if getattr(cache, "is_ragged", False):
            mask = mx.ones_like(mask)
        return super().__call__(x, mask, cache)


class SeesTheLongest(nn.Module):
    """Its mask is that of the longest slot."""

    def __call__(self, x, mask, cache):
        if getattr(cache, "is_ragged", False):
            mask = mx.broadcast_to(mask.any(axis=0, keepdims=True), mask.shape)
        return super().__call__(x, mask, cache)


class IgnoresTheOffset(nn.Module):
    """Puts every slot's tokens at the positions of the first."""

    def __call__(self, x, mask, cache):
        if getattr(cache, "is_ragged", False):
            return super().__call__(x, mask, FirstOffset(cache))
        return super().__call__(x, mask, cache)


class FirstOffset:
    is_ragged = True

    def __init__(self, cache):
        self.cache, self.lengths, self.num_seen = cache, cache.lengths, cache.num_seen
        self.offset = mx.broadcast_to(cache.offset[:1], cache.offset.shape)
        self.packed, self.unpacked = cache.packed, cache.unpacked

    def update_and_fetch(self, keys, values):
        return self.cache.update_and_fetch(keys, values)

    def split(self, keys, values):
        return self.cache.split(keys, values)


class Remembers(nn.Module):
    """Adds a little of the last token that each slot's cache has seen, taken back or not."""

    def __call__(self, x, mask, cache):
        if not getattr(cache, "is_ragged", False):
            return super().__call__(x, mask, cache)
        before = getattr(cache, "seen", None)
        cache.seen = x[:, -1:]
        if before is not None and before.shape[0] == x.shape[0]:
            x = x + 0.1 * before
        return super().__call__(x, mask, cache)


class Scaled(nn.Module):
    """Everything is as it should be, but for a factor."""

    def __call__(self, x, mask, cache):
        factor = 1.1 if getattr(cache, "is_ragged", False) else 1.0
        return factor * super().__call__(x, mask, cache)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (SeesAll, "other bits beside others than alone"),
        (SeesTheLongest, "other bits beside others than alone"),
        (IgnoresTheOffset, "other bits beside others than alone"),
        (Remembers, "depend on tokens that were taken back"),
        (Scaled, "would be decoded wrongly"),
    ],
)
def test_a_planted_family_is_refused_by_the_conformance_check(tmp_path, attention, reason):
    with pytest.raises(ModelError, match=reason):
        conformance(planted(tmp_path, attention))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "olmo2", "granite", "cohere"])
def test_rounding_is_not_taken_for_a_mistake(tmp_path, dtype, name):
    target = make.write_target(tmp_path / "target", families.RIGHT[name])
    assert conformance(load_pair(target=str(target), dtype=dtype).target).divergence > 0


def test_a_number_type_that_experts_do_not_have_here_is_refused(tmp_path):
    target = make.write_target(tmp_path / "target", families.RIGHT["mixtral"])
    with pytest.raises(ModelError, match=r"cannot run it here .*Try --dtype float32"):
        load_pair(target=str(target), dtype="bfloat16")


def test_layers_that_read_the_keys_of_others_attend_as_those_do(tmp_path, monkeypatch):
    target = make.write_target(tmp_path, families.RIGHT["gemma4_text, with shared keys"])
    target = load_pair(target=str(target), dtype="float32").target
    attended, whole = [], attending.ragged_attention

    def noted(queries, *others, **more):
        attended.append(queries.shape[0])
        return whole(queries, *others, **more)

    monkeypatch.setattr(attending, "ragged_attention", noted)
    cache = target.make_cache(3, 8)
    mx.eval(target(mx.zeros((3, 2), mx.int32), cache))
    assert attended == [3] * families.LAYERS
    cache.keep(mx.array([2, 1, 0]))
    mx.eval(target(mx.zeros((3, 1), mx.int32), cache))  # over keys of its own
    assert attended == [3] * (2 * families.LAYERS)
    target.by_itself(mx.zeros((1, 4), mx.int32))
    assert len(attended) == 2 * families.LAYERS  # no cache of ours gave these
    given = [keys for keys, of in attending._caches.values() if of() in cache.layers]
    assert given
    del cache
    gc.collect()
    assert not [keys for keys in given if keys() is not None]
