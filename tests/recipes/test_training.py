"""Training at toy scale: losses fall, data comes back, rounds are counted as decoding counts."""

from itertools import islice
from random import Random

import mlx.core as mx
import numpy as np
import pytest

from dspark_batch.train.fit import Schedule, initialize
from dspark_batch.train.learn import drafting_loss, freeze_ends
from dspark_batch.train.loss import DSPARK
from dspark_batch.train.teacher import Ends, TappedTarget
from recipes.tiny import recipe
from recipes.tiny.answers import answer_batches, load_answers, save_answers
from recipes.tiny.checkpoint import new_drafter, new_target
from recipes.tiny.corpus import conversations
from recipes.tiny.drafter import train_drafter
from recipes.tiny.regenerate import answer_all
from recipes.tiny.rows import Prompt, pack
from recipes.tiny.target import language_loss, train_target
from recipes.tiny.tokenizer import train_tokenizer

SIZES = recipe.Sizes(vocab=320, hidden=32, layers=4, target_mlp=48, drafter_mlp=48, markov_rank=4)


def _texts(count):
    return (recipe._text(each) for each in islice(conversations("test"), count))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(_texts(30), SIZES.vocab - 1)


@pytest.fixture(autouse=True)
def _no_compiler():
    """On a CPU, mx.compile calls a C++ compiler, which takes longer than these few steps."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def target():
    model = new_target(recipe.target_config(SIZES))
    initialize(model, mx.random.key(1))
    return model


def _answer_loss(model, rows):
    tokens, answers = mx.array(rows.tokens).astype(mx.int32), mx.array(rows.answers)
    return language_loss(model(tokens[:, :-1]), tokens[:, 1:], answers[:, 1:])[0].item()


def test_packed_rows_are_full_and_mark_answers(tokenizer):
    rows = pack(tokenizer, Random(1), num_rows=3, row_len=200)
    again = pack(tokenizer, Random(1), num_rows=3, row_len=200)
    assert np.array_equal(rows.tokens, again.tokens)
    assert 0.2 < rows.answers.mean() < 0.9
    ends = rows.tokens == tokenizer.token_to_id("<|im_end|>")
    assert (rows.answers & ends).any()


def test_a_few_steps_lower_the_targets_loss(tokenizer, target):
    rows = pack(tokenizer, Random(2), num_rows=4, row_len=65)
    before = _answer_loss(target, rows)
    train_target(target, [rows] * 12, Schedule(steps=12, peak_lr=1e-2, warmup=2))
    assert _answer_loss(target, rows) < before - 0.5


def test_a_few_steps_lower_the_drafters_loss_and_leave_the_shared_parts(target):
    drafter = new_drafter(recipe.drafter_config(recipe.target_config(SIZES), SIZES, dflash=False))
    initialize(drafter, mx.random.key(2))
    shared = target.model.embed_tokens.weight
    freeze_ends(drafter, Ends(shared, shared))
    tapped = TappedTarget(target, drafter.config.target_layer_ids)
    rng = Random(3)
    pairs = [([rng.randrange(3, 300)] * 9, [7, 8, 9] * 9 + [2]) for _ in range(80)]
    batch = next(answer_batches(pairs, 1, 2 * 192, 1))

    loss = drafting_loss(drafter, tapped, DSPARK, lambda width: 4)

    def now():
        return loss(*batch, mx.random.key(5))[0].item()

    before = now()
    schedule = Schedule(steps=8, peak_lr=1e-2, warmup=2)
    train_drafter(drafter, loss, [batch] * 8, schedule)
    assert now() < before - 0.2
    assert mx.array_equal(drafter.embed_tokens.weight, shared)
    assert mx.array_equal(drafter.lm_head.weight, shared)


def test_answers_come_back_from_disk_and_in_batches(tmp_path):
    pairs = [([1] * (3 + i % 5), list(range(3, 20 + i % 7))) for i in range(40)]
    save_answers(pairs, tmp_path / "answers.npz")
    assert load_answers(tmp_path / "answers.npz") == pairs
    batch = next(answer_batches(pairs, 1, 192 * 4, 1))
    assert batch.tokens.shape == (12, 64)
    found = [row[mask].tolist() for row, mask in zip(*map(np.array, batch), strict=True)]
    assert all(answer in [a for _, a in pairs] for answer in found)


def test_batched_greedy_answers_do_not_depend_on_padding(target):
    prompts = [Prompt([5, 9, 11], 6), Prompt([4, 8, 15, 16, 23, 42], 6)]
    together = answer_all(target, prompts, [0.0, 0.0], stop_id=2, batch=2, seed=0)
    alone = [answer_all(target, [p], [0.0], stop_id=2, batch=1, seed=0)[0] for p in prompts]
    assert together == alone
