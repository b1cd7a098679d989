"""Targets and drafters load from directories and from the Hub's cache, by whatever type."""

import checkpoints as make
import pytest
from loaded import answer

from dspark_batch.pair import load_pair


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


def test_a_drafter_of_a_directory_and_its_digest_name_the_same_files(tmp_path):
    target = make.write_target(tmp_path / "target", make.qwen3())
    drafter = make.write_drafter(tmp_path / "drafter", make.deepspec(make.qwen3()))
    plain = load_pair(target=str(target), dtype="float32")
    pair = load_pair(target=str(target), drafter=str(drafter), dtype="float32")
    assert plain.config.identity["drafter"] is None
    assert pair.config.identity["drafter"] is not None
    assert pair.config.identity["target"] == plain.config.identity["target"]
