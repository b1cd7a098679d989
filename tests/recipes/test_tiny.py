"""The bundled pair: its files, its tokenizer, and that it answers."""

import json
from pathlib import Path
from random import Random

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step
from transformers import AutoTokenizer

import dspark_batch.tiny
from recipes.tiny.checkpoint import load_drafter
from recipes.tiny.corpus import Conversation, held_out_turns
from recipes.tiny.rows import encode_prompt
from recipes.tiny.tokenizer import load_tokenizer, opening

TINY = Path(dspark_batch.tiny.__path__[0])
TARGET, DRAFTER = TINY / "target", TINY / "drafter"
MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TARGET)


def test_all_files_together_fit_in_the_wheel():
    files = [path for path in TINY.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_weights_are_stored_in_bf16():
    for directory in (TARGET, DRAFTER):
        weights = mx.load(str(directory / "model.safetensors"))
        assert {value.dtype for value in weights.values()} == {mx.bfloat16}


def test_any_unicode_goes_in_and_comes_out(tokenizer):
    rng = Random(1)
    planes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(map(chr, rng.choices(planes, k=40))) for _ in range(200)]
    texts += ["", " ", "\n\n \t", "a\x00b", "naïve é é", "👩‍👩‍👧 ‏עברית", "12 345\r\n"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("4096") == list("4096")


def test_the_mask_token_is_no_token_of_the_tokenizer(tokenizer):
    config = json.loads((DRAFTER / "config.json").read_text())
    assert config["mask_token_id"] == config["vocab_size"] - 1 == len(tokenizer)


def test_the_chat_template_renders_what_training_saw(tokenizer):
    user = {"role": "user", "content": "Reverse the word “stone”."}
    system = {"role": "system", "content": "Be brief.\n- Always."}
    for messages, head in (([user], None), ([system, user], system["content"])):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == opening(head, user["content"])
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == load_tokenizer(TARGET).encode(text).ids


def test_the_drafter_shares_the_targets_embedding():
    drafter, target = load_drafter(DRAFTER), mx.load(str(TARGET / "model.safetensors"))
    shared = target["model.embed_tokens.weight"].astype(drafter.lm_head.weight.dtype)
    assert mx.array_equal(drafter.embed_tokens.weight, shared)
    assert mx.array_equal(drafter.lm_head.weight, shared)


def test_it_answers_a_held_out_task_right():
    model, wrapped = load(str(TARGET))
    model.set_dtype(mx.float32)
    turn = next(turn for turn in held_out_turns("tiny", 1) if turn.kind == "reverse")
    prompt = wrapped.apply_chat_template(
        [{"role": "user", "content": turn.task.prompt}], add_generation_prompt=True
    )
    ids = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=64):
        if token in wrapped.eos_token_ids:
            break
        ids.append(token)
    assert wrapped.decode(ids) == turn.task.answer


def test_a_prompt_is_encoded_as_the_template_renders_it(tokenizer):
    first, second = held_out_turns("two turns", 1)[:2]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": first.task.prompt},
        {"role": "assistant", "content": first.task.answer},
        {"role": "user", "content": second.task.prompt},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    conversation = Conversation("Be brief.", (first, second))
    assert encode_prompt(load_tokenizer(TARGET), conversation).ids == ids
