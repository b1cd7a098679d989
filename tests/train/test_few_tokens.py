"""Which tokens a drafter drafts: those that its target's answers are made of."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from small_jobs import rows_in

from dspark_batch import Spec, load_pair, run
from dspark_batch.drafters import few_tokens
from dspark_batch.drafters.drafter_config import DrafterConfig
from dspark_batch.drafters.few_tokens import DRAFT_TOKENS, worth_drafting
from dspark_batch.errors import ModelError
from dspark_batch.output.look import look
from dspark_batch.train import session
from dspark_batch.train.place import Place
from dspark_batch.train_drafter import Asked, train_drafter

ASKED = Asked(layers=1, block=4, taps=(0, 2), rank=8, steps=2)


def gathered(to, answered):
    return session.gather(
        [look(str(answered))], None, Place(str(to)).work, by=None, most_tokens=256
    )


def counts(vocab_size, *often):
    return np.array([*often, *[0] * (vocab_size - len(often))])


def test_the_most_frequent_tokens_are_drafted_until_one_in_a_thousand_is_left():
    often = [10_000] * 100 + [100] * 200
    np.random.default_rng(3).shuffle(often)
    found = worth_drafting(counts(4096, *often))
    assert len(found) == 384  # 290 leave less than one in a thousand; then up to a multiple of 128
    assert found == sorted(found)
    often = [10_000] * 200 + [2] * 1000  # 1 in 1,000 of these is the rare ones together
    assert len(worth_drafting(counts(4096, *often))) == 256


def test_few_answers_leave_every_token():
    assert worth_drafting(counts(4096, *[1000] * 10, *[1] * 200)) is None  # 2 % occur once
    assert worth_drafting(counts(512, *[100] * 300)) is None  # half leaves 15 % out
    assert worth_drafting(counts(4096)) is None  # none at all


def test_half_of_a_vocabulary_is_drafted_where_more_is_needed_for_the_last_thousandth():
    found = worth_drafting(counts(1024, *[1000] * 500, *[10] * 100))  # half leaves 0.2 % out
    assert len(found) == 512
    assert found[:500] == list(range(500))


def test_tokens_of_before_are_drafted_whatever_occurs():
    known = list(range(3000, 3300))
    found = worth_drafting(counts(8192, *[1000] * 100), known)
    assert set(known) | set(range(100)) <= set(found)
    assert len(found) == 512


@pytest.fixture(scope="module")
def trained(tmp_path_factory, answered):
    """A drafter of few tokens, though its answers are few."""
    to = tmp_path_factory.mktemp("few") / "drafter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_batch.train.sizes._CPU_TOKENS", 256)
        patch.setattr(few_tokens, "_MOST_UNKNOWN", 1.0)
        return to, train_drafter([str(answered)], str(to), ASKED)


def test_a_training_names_the_tokens_and_keeps_whole_tensors(trained, answered, target):
    to, training = trained
    ids = json.loads((to / DRAFT_TOKENS).read_text())
    said = {token for row in rows_in(answered) for token in row["token_ids"]}
    assert len(ids) == training.about["draft_tokens"] < 1536
    assert len(said & set(ids)) > 0.9 * len(said)
    weights = mx.load(str(to / "model.safetensors"))
    for name in ("lm_head.weight", "markov_head.markov_w2.weight"):
        assert weights[name].shape[0] == 1536
    drafter = load_pair(target=str(target), drafter=str(to)).drafter
    assert drafter.among.ids.tolist() == ids
    assert drafter.lm_head.weight.shape[0] == len(ids)


def test_what_is_measured_is_what_few_tokens_do(trained, answered, target):
    to, training = trained
    spec = Spec(
        inputs=look(str(answered)).spec.inputs,
        out=str(to.parent / "drafted.jsonl"),
        target=str(target),
        drafter=str(to),
        max_tokens=20,
        slots=8,
        draft_length=4,
    )
    run(spec)
    rows, before = rows_in(to.parent / "drafted.jsonl"), rows_in(answered)
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in before]
    by_id = {tuple(row["token_ids"]): row["metrics"]["speculative_decoding"] for row in rows}
    corpus = gathered(to, answered)
    held_out = [by_id[tuple(corpus.sample(row).answer)] for row in corpus.held_out]
    assert sum(each["num_spec_steps"] for each in held_out) == training.after["all"]["rounds"]


def test_only_answers_that_training_sees_are_counted(trained, answered):
    corpus = gathered(trained[0], answered)
    learnt = [token for row in corpus.learnt for token in corpus.sample(row).answer]
    assert len(corpus.held_out)
    assert corpus.answered(1536).tolist() == np.bincount(learnt, minlength=1536).tolist()


def test_what_is_measured_drafts_what_is_stored(trained):
    config = DrafterConfig.from_dict(json.loads((trained[0] / "config.json").read_text()))
    weights = mx.load(str(trained[0] / "model.safetensors"))
    few = session._as_stored(config, weights, [3, 4, 9])
    assert few.among.ids.tolist() == [3, 4, 9]
    assert few.markov_head.markov_w2.weight.shape[0] == 3
    assert session._as_stored(config, weights, None).among is None


def test_a_drafter_that_is_gone_on_with_keeps_its_tokens(trained, answered, tmp_path, monkeypatch):
    monkeypatch.setattr(few_tokens, "_MOST_UNKNOWN", 1.0)
    asked = Asked(init=str(trained[0]), steps=1)
    ids = json.loads((trained[0] / DRAFT_TOKENS).read_text())
    more = sorted({*ids, 1535})
    (trained[0] / DRAFT_TOKENS).write_text(json.dumps(more))
    training = train_drafter([str(answered)], str(tmp_path / "more"), asked)
    (trained[0] / DRAFT_TOKENS).write_text(json.dumps(ids))
    found = json.loads((tmp_path / "more" / DRAFT_TOKENS).read_text())
    assert set(more) < set(found)
    assert len(found) % 128 == 0
    assert training.before["all"]["tokens"] == trained[1].after["all"]["tokens"]
    weights = mx.load(str(tmp_path / "more" / "model.safetensors"))
    assert weights["markov_head.markov_w2.weight"].shape[0] == 1536


def test_a_drafter_of_all_tokens_that_is_gone_on_with_drafts_all(
    trained, answered, tmp_path, monkeypatch
):
    monkeypatch.setattr(few_tokens, "_MOST_UNKNOWN", 1.0)
    shutil.copytree(trained[0], tmp_path / "all")
    (tmp_path / "all" / DRAFT_TOKENS).unlink()
    asked = Asked(init=str(tmp_path / "all"), steps=1)
    training = train_drafter([str(answered)], str(tmp_path / "more"), asked)
    assert training.about["draft_tokens"] == 1536
    assert not (tmp_path / "more" / DRAFT_TOKENS).exists()


@pytest.mark.parametrize(
    ("name", "rows"),
    [("lm_head.weight", 700), ("markov_head.markov_w2.weight", 10), ("lm_head.weight", 2000)],
)
def test_a_damaged_head_is_refused_before_rows_are_taken(trained, target, tmp_path, name, rows):
    shutil.copytree(trained[0], tmp_path / "bad")
    weights = mx.load(str(tmp_path / "bad" / "model.safetensors"))
    mx.eval(weights)
    weights[name] = mx.zeros((rows, weights[name].shape[1]))
    mx.save_safetensors(str(tmp_path / "bad" / "model.safetensors"), weights)
    with pytest.raises(ModelError, match="a row for each of 1536 tokens"):
        load_pair(target=str(target), drafter=str(tmp_path / "bad"))


def test_two_lists_of_tokens_are_refused(trained, target, tmp_path):
    shutil.copytree(trained[0], tmp_path / "bad")
    weights = mx.load(str(tmp_path / "bad" / "model.safetensors"))
    mx.eval(weights)
    weights["d2t"] = mx.zeros(4, mx.int64)
    mx.save_safetensors(str(tmp_path / "bad" / "model.safetensors"), weights)
    with pytest.raises(ModelError, match="which both say what is drafted"):
        load_pair(target=str(target), drafter=str(tmp_path / "bad"))


def test_another_list_of_tokens_is_another_drafter(trained, target):
    to, path = trained[0], trained[0] / DRAFT_TOKENS
    text = path.read_text()
    first = load_pair(target=str(target), drafter=str(to)).config.identity["drafter"]
    path.write_text(json.dumps(json.loads(text)[:-1]))
    second = load_pair(target=str(target), drafter=str(to)).config.identity["drafter"]
    path.write_text(text)
    assert first != second


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2", "not JSON"),
        ("[]", "rising token ids"),
        ("[4, 3]", "rising token ids"),
        ("[3, 1536]", "from 0 to 1535"),
        ("[-1, 3]", "rising token ids"),
        ('["1"]', "rising token ids"),
        ("[true, 3]", "rising token ids"),
    ],
)
def test_a_damaged_list_is_refused_in_a_sentence(trained, target, text, words):
    to, path = trained[0], trained[0] / DRAFT_TOKENS
    good = path.read_text()
    path.write_text(text)
    with pytest.raises(ModelError, match=words) as caught:
        load_pair(target=str(target), drafter=str(to))
    path.write_text(good)
    assert str(path) in str(caught.value)
    assert "Delete it" in str(caught.value)


def test_a_list_that_cannot_be_read_is_refused_in_a_sentence(tmp_path):
    (tmp_path / DRAFT_TOKENS).mkdir()
    with pytest.raises(ModelError, match=f"{DRAFT_TOKENS}: cannot be read .* Delete it"):
        few_tokens.draft_tokens(tmp_path, 1536)
