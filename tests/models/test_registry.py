"""The registered pairs: their numbers follow from their shapes, and the disk is told truly."""

import re
from pathlib import Path

import checkpoints as make
import mlx.core as mx
import pytest
from fake_hub import point_client_at
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from dspark_batch.cli.main import main
from dspark_batch.drafters.drafter_config import DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.models.hub import locate
from dspark_batch.models.number_type import set_dtype
from dspark_batch.models.pairs import KNOWN_PAIRS, drafter_for, pair_of
from dspark_batch.models.target import Target
from dspark_batch.registry import list_pairs

# hidden, MLP, heads, layers, tied: the public configs; the rest is the same for all of a family
QWEN3 = {
    "qwen3": (2560, 9728, 32, 36, True, [1, 9, 17, 25, 33]),
    "qwen3-8b": (4096, 12288, 32, 36, False, [1, 9, 17, 25, 33]),
    "qwen3-14b": (5120, 17408, 40, 40, False, [1, 10, 19, 28, 37]),
}
GEMMA4 = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "vocab_size": 262144,
    "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(48)],
}


# layers, hidden, MLP, heads, key heads, value heads of the recurrence, tied
QWEN35 = {
    "qwen3.5-4b": (32, 2560, 9216, 16, 4, 32, True),
    "qwen3.5-9b": (32, 4096, 12288, 16, 4, 32, False),
    "qwen3.5-27b": (64, 5120, 17408, 24, 4, 48, False),
    "qwen3.6-27b": (64, 5120, 17408, 24, 4, 48, False),
    "qwen3.5-35b-a3b": (40, 2048, 512, 16, 2, 32, False),
    "qwen3.6-35b-a3b": (40, 2048, 512, 16, 2, 32, False),
}
EXPERTS = {
    "model_type": "qwen3_5_moe",
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "shared_expert_intermediate_size": 512,
}


def hybrid(family):
    """The config of a hybrid target with the real sizes."""
    layers, hidden, inner, heads, kv_heads, value_heads, tied = QWEN35[family]
    config = {
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "vocab_size": 248320,
    }
    return config | (EXPERTS if "a3b" in family else {})


def target_of(family):
    return hybrid(family) if family in QWEN35 else full_size(family)[0]


def full_size(family):
    """The configs of target and drafter with the real sizes."""
    if family == "gemma4":
        target, taps = make.gemma4(48, **GEMMA4), [5, 17, 29, 41, 46]
    else:
        hidden, inner, heads, layers, tied, taps = QWEN3[family]
        target = make.qwen3(
            layers,
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=tied,
        )
    return target, make.deepspec(target, taps=taps, layers=5, markov_rank=256)


def count(module):
    return sum(array.size for _, array in tree_flatten(module.parameters()))


@pytest.mark.parametrize("family", [*QWEN3, "gemma4"])
def test_the_parameters_of_a_pair_follow_from_its_shapes(family):
    known = KNOWN_PAIRS[family]
    target, drafter = full_size(family)
    lazy = DSparkDrafter(DrafterConfig.from_dict(drafter))  # nothing is computed
    assert count(make.model_of(target)) == known.target_params
    assert count(lazy) == known.drafter_params
    assert count(lazy.embed_tokens) + count(lazy.lm_head) == known.shared_params


@pytest.mark.parametrize("family", QWEN35)
def test_the_parameters_of_a_hybrid_pair_follow_from_its_shapes(family):
    known = KNOWN_PAIRS[family]
    config = hybrid(family)
    assert count(make.model_of(config)) == known.target_params
    size, inner = config["hidden_size"], config["intermediate_size"]
    layer = 2 * size * 4096 + 2 * size * 1024 + 3 * size * inner + 2 * size + 2 * 128
    drafter = 5 * layer + 5 * size * size + 2 * size  # five layers, five taps
    assert known.drafter_params in (None, drafter)
    assert known.thinking


@pytest.mark.parametrize("family", [*QWEN3, "gemma4", *QWEN35])
def test_what_a_slot_takes_follows_from_the_shapes(family):
    model = make.model_of(target_of(family))
    set_dtype(model, mx.bfloat16)  # nothing is computed
    known = KNOWN_PAIRS[family]
    assert Target(model).cached_bytes() == (known.position_bytes, known.state_bytes)


def test_the_parameters_of_the_bundled_pair_are_those_of_its_files():
    known = KNOWN_PAIRS["tiny"]
    model, _ = load_model(Path(known.target), lazy=True)
    config = make.read(Path(known.drafter) / "config.json")
    lazy = DSparkDrafter(DrafterConfig.from_dict(config))
    assert (count(model), count(lazy)) == (known.target_params, known.drafter_params)
    assert count(lazy.embed_tokens) + count(lazy.lm_head) == known.shared_params


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with one whole pair, and of another the target only, and that in part."""
    point_client_at(monkeypatch, tmp_path / "hub")
    target = make.qwen3()
    parts = {
        "target": make.write_target(tmp_path / "t", target, shards=2),
        "drafter": make.write_drafter(tmp_path / "d", make.deepspec(target)),
    }
    make.hub_cache(tmp_path / "hub", "Qwen/Qwen3-4B", parts["target"])
    make.hub_cache(tmp_path / "hub", "deepseek-ai/dspark_qwen3_4b_block7", parts["drafter"])
    make.hub_cache(tmp_path / "hub", "deepseek-ai/dspark_gemma4_12b_block7", parts["drafter"])
    (parts["target"] / "model-00002-of-00002.safetensors").unlink()
    make.hub_cache(tmp_path / "hub", "Qwen/Qwen3-8B", parts["target"])


@pytest.mark.usefixtures("hub")
def test_the_disk_is_told_truly_and_no_network_is_asked(capsys):
    by_family = {pair.family: pair for pair in list_pairs()}
    assert {family: pair.on_disk for family, pair in by_family.items()} == {
        "tiny": "yes",
        "qwen3": "yes",
        "qwen3-8b": "in part",
        "qwen3-14b": "no",
        "gemma4": "drafter only",
    } | dict.fromkeys(QWEN35, "no")
    (damage,) = by_family["qwen3-8b"].damage
    assert "model-00002-of-00002.safetensors: missing" in damage
    assert locate("Qwen/Qwen3-4B").source.endswith(make.COMMIT)

    assert main(["pairs"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", heading) == [
        *("family", "target", "drafter", "parameters", "memory", "slot"),
        *("thinking", "on disk"),
    ]
    assert re.split(r"  +", lines[1]) == [
        *("qwen3", "Qwen/Qwen3-4B", "deepseek-ai/dspark_qwen3_4b_block7", "4.0 B + 1.4 B"),
        *("9.3 GB", "147 kB a token", "no", "yes"),
    ]
    assert [line.split("  ")[-1] for line in lines[:5]] == [
        *("yes", "yes", "in part", "no", "drafter only")
    ]


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        *((known.target, known.drafter) for known in KNOWN_PAIRS.values() if not known.bundled),
        ("qwen/qwen3.5-27b@main", "z-lab/Qwen3.5-27B-DFlash"),
        ("mlx-community/Qwen3-8B-4bit", "deepseek-ai/dspark_qwen3_8b_block7"),
        ("mlx-community/Qwen3.5-35B-A3B-MLX-mxfp4", "z-lab/Qwen3.5-35B-A3B-DFlash"),
        ("Qwen/Qwen3-4B-Instruct-2507", None),
        ("mlx-community/Qwen3-4B-Instruct-2507-4bit", None),
        ("somebody/Qwen3-4B", None),
        ("Qwen/Qwen3.8-27B", None),  # its drafter is of a kind that is refused
        ("models/Qwen3-4B", None),
        (KNOWN_PAIRS["tiny"].target, None),
    ],
)
def test_a_target_finds_its_drafter_by_its_name(target, drafter):
    assert drafter_for(None, target, None) == drafter
    assert drafter_for(None, target, "mine") == "mine"
    assert drafter_for("qwen3", target, None) is None  # the family has its own


def test_a_directory_has_no_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Qwen/Qwen3-4B").mkdir(parents=True)
    assert pair_of("Qwen/Qwen3-4B") is None


@pytest.fixture
def named(tmp_path, monkeypatch):
    """The bundled pair under the names of another one; and a prompt."""
    tiny = KNOWN_PAIRS["tiny"]
    point_client_at(monkeypatch, tmp_path / "hub")
    make.hub_cache(tmp_path / "hub", "Qwen/Qwen3.5-4B", Path(tiny.target))
    make.hub_cache(tmp_path / "hub", "z-lab/Qwen3.5-4B-DFlash", Path(tiny.drafter))
    make.hub_cache(tmp_path / "hub", "somebody/else", Path(tiny.target))
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "Hello"}\n')


@pytest.mark.parametrize(
    ("words", "drafts", "says"),
    [
        (
            "--target Qwen/Qwen3.5-4B",
            True,
            f"z-lab/Qwen3.5-4B-DFlash@{make.COMMIT} is known for Qwen/Qwen3.5-4B; thinking on, as "
            "the drafter was trained",
        ),
        (
            "--target somebody/else --draft z-lab/Qwen3.5-4B-DFlash --num-draft-tokens 3",
            True,
            "drafts as asked; thinking on, as the drafter was trained",
        ),
        ("--target Qwen/Qwen3.5-4B --draft-length 0", False, "no drafter"),
        ("--target somebody/else", False, "no drafter; none is known for somebody/else"),
    ],
)
@pytest.mark.usefixtures("named")
def test_a_run_says_what_follows_from_the_names(words, drafts, says, capsys):
    job = ["run", "prompts.jsonl", "-o", "out.jsonl", "--max-tokens", "4"]
    assert main([*job, *words.split()]) == 0
    out = capsys.readouterr().out
    assert says in out
    assert ("accept length" in out) == drafts
