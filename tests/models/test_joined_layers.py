"""Layers with joined products, where a CPU stands in for the kernels that a GPU would run."""

from pathlib import Path

import joined_ops
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3
from mlx_lm.models.cache import make_prompt_cache

from dspark_batch import device
from dspark_batch.baseline.outside import generate_outside
from dspark_batch.caches.positions import PositionCache
from dspark_batch.caches.slot_cache import Extent
from dspark_batch.drafters.drafter_config import DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.models import joined_layers, joined_products
from dspark_batch.models.attention import let_caches_choose
from dspark_batch.models.joined_layers import join_draft_layers, join_layers
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.models.target import PairConfig, Target
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.pair import Pair, _tap
from dspark_batch.types import Item, Request

PAIR_CONFIG = PairConfig(None, "bfloat16", 4096, frozenset(), {})
KERNELS = ("split_heads", "gated", "add_and_normalise")
SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
}


@pytest.fixture(params=[True, False])
def _stand_ins(monkeypatch, request):
    for name in KERNELS:
        monkeypatch.setattr(joined_layers, name, getattr(joined_ops, name))
    monkeypatch.setattr(device, "is_cuda", lambda: True)
    monkeypatch.setattr(joined_layers, "_LEAST_BYTES", 0)
    monkeypatch.setattr(device, "launches_one_by_one", lambda: request.param)


@pytest.fixture
def _in_halves(monkeypatch):
    monkeypatch.setattr(
        joined_products, "in_halves", lambda p: p._replace(size=p.size // 2, matrices=2)
    )


def _model(module, **changes):
    args = module.ModelArgs.from_dict(
        {"model_type": module.__name__.split(".")[-1], **SIZES, **changes}
    )
    model = module.Model(args)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    make_rows_safe(model)
    let_caches_choose(model)
    return model


def _caches(model):
    extent = Extent(2, 64)
    extent.lengths = mx.array([3, 0], dtype=mx.int32)
    return extent, [PositionCache(extent) for _ in model.layers]


def _steps(model, tokens=((1, 2, 3), (4, 5, 6)), shared=0):
    """Run two steps, of which two tokens stay each; give logits and caches.

    Behind the first one, slots share the first positions, which are zeros.
    """
    extent, caches = _caches(model)
    extent.lengths = extent.lengths + shared
    found = []
    for _ in range(2):
        found.append(model(mx.array(tokens), cache=caches))
        extent.lengths = extent.lengths + 2
        for cache in caches:
            cache.share(shared, 0)
    found += [array for cache in caches for array in cache.held()]
    mx.eval(found)
    return found


def _are_equal(expected, found):
    return all(mx.array_equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("module", [qwen3, llama])
def test_joined_layers_have_the_bits_of_the_models_own_code(module):
    model = _model(module)
    tokens = mx.array([[1, 2, 3], [4, 5, 6]])
    expected, by_itself = _steps(model), model(tokens, cache=make_prompt_cache(model))
    with_beginning = _steps(model, shared=32)

    assert join_layers(model.layers, model.model.norm) == 3

    assert _are_equal(expected, _steps(model))
    assert _are_equal(with_beginning, _steps(model, shared=32))
    assert mx.array_equal(model(tokens, cache=make_prompt_cache(model)), by_itself)


def _in_two_ways(monkeypatch):
    """Make two joined models of the same weights; of one the model's own code runs."""
    joined, apart = _model(qwen3), _model(qwen3)
    apart.update(joined.parameters())
    join_layers(joined.layers, joined.model.norm)
    with monkeypatch.context() as never:
        never.setattr(joined_layers, "_let_run", lambda layer, own: None)
        join_layers(apart.layers, apart.model.norm)
    return joined, apart


@pytest.mark.usefixtures("_stand_ins", "_in_halves")
def test_sums_in_halves_have_the_same_bits_joined_and_by_the_models_own_code(monkeypatch):
    joined, apart = _in_two_ways(monkeypatch)
    tokens = [[3 * slot + i for i in range(3)] for slot in range(2)]

    assert _are_equal(_steps(apart, tokens), _steps(joined, tokens))
    assert _are_equal(_steps(apart, shared=32), _steps(joined, shared=32))
    many = mx.random.normal((40, 64), key=mx.random.key(2)).astype(mx.bfloat16)
    down = apart.layers[0].mlp.down_proj
    assert mx.array_equal(down(many)[5:8], down(many[5:8]))


@pytest.mark.usefixtures("_stand_ins", "_in_halves")
def test_a_sum_in_halves_is_the_sum_within_rounding():
    model = _model(qwen3)
    hidden = mx.random.normal((5, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    down = model.layers[0].mlp.down_proj
    weight, whole = mx.array(down.weight), down(hidden)

    join_layers(model.layers, model.model.norm)

    first, second = (hidden[:, at] @ weight[:, at].T for at in (slice(32), slice(32, None)))
    assert mx.array_equal(down(hidden), first + second)
    assert not mx.array_equal(down(hidden), whole)  # or this tests nothing
    assert mx.allclose(down(hidden), whole, atol=0.02)


@pytest.mark.usefixtures("_stand_ins", "_in_halves")
def test_mlx_lms_own_pass_multiplies_wholes_and_lets_them_go():
    model, tokens = _model(qwen3), mx.array([[1, 2, 3], [4, 5, 6]])
    with as_they_come():
        expected = model(tokens, cache=make_prompt_cache(model))
    mx.eval(expected)  # or it holds the weights
    join_layers(model.layers, model.model.norm)
    _steps(model)
    before = mx.get_active_memory()

    with as_they_come():
        found = model(tokens, cache=make_prompt_cache(model))
        assert mx.array_equal(found, expected)
    found = None

    assert mx.get_active_memory() - before < 1000


@pytest.mark.usefixtures("_stand_ins", "_in_halves")
def test_a_layer_that_is_not_joined_gets_its_weight_back(monkeypatch):
    model = _model(qwen3)
    expected, kinds = _steps(model), [type(layer.mlp.down_proj) for layer in model.layers]
    monkeypatch.setattr(joined_layers, "_is_exact", lambda own, call: False)

    assert join_layers(model.layers, model.model.norm) == 0

    assert [type(layer.mlp.down_proj) for layer in model.layers] == kinds
    assert _are_equal(expected, _steps(model))


@pytest.mark.usefixtures("_stand_ins", "_in_halves")
def test_a_target_whose_sums_are_in_halves_passes_what_is_checked_at_load():
    target = _tap(_model(qwen3), (0, 2), None, Path("here"))
    assert all(layer.runs_joined for layer in target.model.layers)


@pytest.mark.usefixtures("_stand_ins", "_in_halves")
def test_mlx_lms_generation_makes_whole_weights_once(monkeypatch):
    target, wholes = Target(_model(qwen3), (), PAIR_CONFIG), []
    whole = joined_products._InHalves._whole
    monkeypatch.setattr(
        joined_products._InHalves, "_whole", lambda self: wholes.append(self) or whole(self)
    )
    items = [Item(n, str(n), f"{n:032x}", f"test:{n}") for n in range(2)]
    stream = [Request(item, (1, 2, 3), 5) for item in items]

    found = list(generate_outside(Pair(target, None, NoDrafter(), PAIR_CONFIG), 2, stream))

    assert [len(completion.token_ids) for completion in found] == [5, 5]
    assert len(wholes) == len(target.model.layers)


@pytest.mark.usefixtures("_stand_ins", "_in_halves")
def test_a_drafter_has_whole_sums():
    drafter = _drafter()
    weights = [layer.mlp.down_proj["weight"] for layer in drafter.layers]

    assert join_draft_layers(drafter.layers, drafter.norm) == 3

    assert all(
        layer.mlp.down_proj["weight"] is weight
        for layer, weight in zip(drafter.layers, weights, strict=True)
    )


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("are_halved", [False, True])
def test_a_joined_weight_takes_no_memory_besides(are_halved, request):
    if are_halved:
        request.getfixturevalue("_in_halves")
    model = _model(qwen3)
    before = mx.get_active_memory()

    join_layers(model.layers, model.model.norm)

    assert mx.get_active_memory() - before < 1000  # a norm's and a kernel's numbers


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("are_halved", [False, True])
def test_a_weight_that_changes_counts(are_halved, request):
    if are_halved:
        request.getfixturevalue("_in_halves")
    model, other = _model(qwen3), _model(qwen3)
    join_layers(model.layers, model.model.norm)

    model.update(other.parameters())

    assert _are_equal(_steps(other), _steps(model))


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("wrong", KERNELS)
def test_a_kernel_with_other_bits_is_not_used(wrong, monkeypatch):
    model, right = _model(qwen3), getattr(joined_ops, wrong)

    def other(*arguments, **named):
        made = right(*arguments, **named)
        first, *rest = made if isinstance(made, tuple) else (made,)
        first = mx.where(mx.arange(first.size).reshape(first.shape) == 7, first * 1.01, first)
        return (first, *rest) if rest else first

    monkeypatch.setattr(joined_layers, wrong, other)
    expected = _steps(model)

    assert join_layers(model.layers, model.model.norm) == 0

    assert _are_equal(expected, _steps(model))


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"hidden_size": 516}, {"intermediate_size": 60}]
)
def test_a_layer_that_is_not_plain_stays_as_it_is(changes):
    model = _model(llama, **changes)

    assert join_layers(model.layers, model.model.norm) == 0


@pytest.mark.usefixtures("_stand_ins")
def test_a_small_model_stays_as_it_is(monkeypatch):
    model = _model(qwen3)
    parameters = tree_flatten([layer.parameters() for layer in model.layers])
    size = sum(array.nbytes for _, array in parameters)
    monkeypatch.setattr(joined_layers, "_LEAST_BYTES", size + 1)

    assert join_layers(model.layers, model.model.norm) == 0


@pytest.mark.usefixtures("_stand_ins")
def test_quantised_layers_stay_as_they_are():
    model = _model(qwen3)
    nn.quantize(model, bits=8)

    assert join_layers(model.layers, model.model.norm) == 0


@pytest.mark.usefixtures("_stand_ins")
def test_a_layer_that_another_target_joined_is_joined_once():
    model = _model(qwen3)
    expected = _steps(model)
    join_layers(model.layers, model.model.norm)

    assert join_layers(model.layers, model.model.norm) == 0
    assert _are_equal(expected, _steps(model))


def _drafter():
    config = DrafterConfig.from_dict(
        {
            "architectures": ["Qwen3DSparkModel"],
            **SIZES,
            "block_size": 3,
            "target_layer_ids": [0],
            "mask_token_id": 31,
            "num_target_layers": 3,
            "markov_rank": 8,
            "markov_head_type": "vanilla",
            "enable_confidence_head": False,
        }
    )
    drafter = DSparkDrafter(config)
    drafter.set_dtype(mx.bfloat16)
    mx.eval(drafter.parameters())
    make_rows_safe(drafter)
    return drafter


def _drafted(drafter, shared=0):
    """Draft three times behind 34 positions that are alike, of which slots may share the first."""
    context = drafter.make_cache(2, 64)
    features = mx.random.normal((1, 34, 512), key=mx.random.key(9)).astype(mx.bfloat16)
    drafter.extend(context, mx.broadcast_to(features, (2, 34, 512)))
    context.keep(mx.array([34, 34], dtype=mx.int32))
    context.share(shared, 0)
    found = []
    for i in range(3):
        features = mx.random.normal((2, 2, 512), key=mx.random.key(i)).astype(mx.bfloat16)
        drafter.extend(context, features)
        context.keep(mx.array([1, 2], dtype=mx.int32))
        draft = drafter.propose(
            mx.array([1, 2]), context, 3, lambda x, k, among: mx.argmax(x, axis=-1)
        )
        found += [draft.tokens, draft.logits]
        mx.eval(found, context.arrays())
    return found


@pytest.mark.usefixtures("_stand_ins")
def test_joined_draft_layers_have_the_bits_of_their_own_code():
    drafter = _drafter()
    expected, over_beginning = _drafted(drafter), _drafted(drafter, shared=32)

    assert join_draft_layers(drafter.layers, drafter.norm) == 3

    assert _are_equal(expected, _drafted(drafter))
    assert _are_equal(over_beginning, _drafted(drafter, shared=32))
