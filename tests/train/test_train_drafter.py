"""From the rows of a run to a drafter that this program loads, killed or not."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from small_jobs import rows_in

from dspark_batch import Spec, load_pair, run
from dspark_batch.check import open_reading
from dspark_batch.errors import ModelError, OutputInUse, Resumable, ResumeMismatch, UsageError
from dspark_batch.output.look import look
from dspark_batch.output.push import push_drafter
from dspark_batch.record.run_dir import RunDir
from dspark_batch.train import session
from dspark_batch.train.corpus import Corpus, Rendering
from dspark_batch.train.place import Place
from dspark_batch.train.sizes import sizes_for
from dspark_batch.train_drafter import Asked, train_drafter

SMALL = Asked(layers=1, block=4, taps=(0, 2), rank=8, steps=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, answered):
    """A training that nobody disturbed."""
    to = tmp_path_factory.mktemp("whole") / "drafter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_batch.train.sizes._CPU_TOKENS", 256)
        patch.setattr("dspark_batch.train.session._STATES", 1000)
        return to, train_drafter([str(answered)], str(to), SMALL)


def weights_of(directory):
    return mx.load(str(directory / "model.safetensors"))


def assert_same_weights(a, b):
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def drafted(whole, answered, target):
    """The rows of the same job with the drafter, all drafts of every round verified."""
    job = Spec(
        inputs=look(str(answered)).spec.inputs,
        out=str(whole[0].parent / "drafted.jsonl"),
        target=str(target),
        drafter=str(whole[0]),
        max_tokens=20,
        slots=8,
        draft_length=4,
    )
    run(job)
    return rows_in(Path(job.out))


def test_the_drafter_is_loaded_and_changes_no_answer(drafted, answered):
    before = rows_in(answered)
    assert [row["token_ids"] for row in drafted] == [row["token_ids"] for row in before]
    assert all(row["metrics"]["speculative_decoding"]["num_draft_tokens"] for row in drafted)


def test_what_is_measured_is_what_decoding_does(whole, answered, drafted):
    to, training = whole
    place = Place(str(to))
    corpus = session.gather([look(str(answered))], None, place.work, by=None, most_tokens=256)
    rows = {tuple(row["token_ids"]): row["metrics"]["speculative_decoding"] for row in drafted}
    held_out = [rows[tuple(corpus.sample(row).answer)] for row in corpus.held_out]
    assert sum(each["num_spec_steps"] for each in held_out) == training.after["all"]["rounds"]
    accepted = sum(each["num_accepted_draft_tokens"] for each in held_out)
    report = training.after["all"]
    assert accepted == pytest.approx(sum(report["accept_rate"]) * report["rounds"], abs=0.1)


def test_a_training_that_was_interrupted_anywhere_ends_with_the_same_weights(
    whole, answered, tmp_path
):
    to, stops = tmp_path / "drafter", [1, 3, 4]

    def stop(lesson):
        if stops and lesson.step == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    while stops:
        with pytest.raises(KeyboardInterrupt):
            train_drafter([str(answered)], str(to), SMALL, observe=stop)
        assert not to.exists()
    training = train_drafter([str(answered)], str(to), SMALL)
    assert_same_weights(whole[0], to)
    assert training.curve == whole[1].curve
    again = train_drafter([str(answered)], str(to), SMALL)  # is done, and only told
    assert again.after == training.after


def test_a_killed_training_ends_with_the_same_weights(whole, answered, tmp_path):
    to = tmp_path / "drafter"
    program = (
        "import sys, os, signal\n"
        "import dspark_batch\n"
        "from dspark_batch.train import session, sizes\n"
        "from dspark_batch.train_drafter import Asked, train_drafter\n"
        "sizes._CPU_TOKENS, session._STATES = 256, 1000\n"
        "def die(lesson):\n"
        "    if lesson.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "asked = Asked(layers=1, block=4, taps=(0, 2), rank=8, steps=6)\n"
        "train_drafter([sys.argv[1]], sys.argv[2], asked, observe=die)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(answered), str(to)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert Place(str(to)).state().step == 4
    train_drafter([str(answered)], str(to), SMALL)
    assert_same_weights(whole[0], to)


def test_a_training_whose_time_is_over_says_that_it_goes_on(whole, answered, tmp_path, monkeypatch):
    spent = SimpleNamespace(allows_one_more=lambda: False)
    to = str(tmp_path / "drafter")
    door = sys.modules["dspark_batch.train_drafter"]
    monkeypatch.setattr(door, "Budget", lambda *_: spent)
    with pytest.raises(Resumable, match="after step 1 of 6; the same command goes on"):
        train_drafter([str(answered)], to, SMALL, max_runtime="1s")
    monkeypatch.undo()
    monkeypatch.setattr("dspark_batch.train.sizes._CPU_TOKENS", 256)
    train_drafter([str(answered)], to, SMALL)
    assert_same_weights(whole[0], tmp_path / "drafter")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves_its_state(whole, answered, tmp_path, number, code):
    to = tmp_path / "drafter"
    program = (
        "import os, sys\n"
        "import dspark_batch\n"
        "from dspark_batch.cli.main import main\n"
        "from dspark_batch.train import session, sizes\n"
        "sizes._CPU_TOKENS, session._CURVE_POINTS, session._STATES = 256, 2, 1\n"
        "key = session.Schedule.key\n"
        "def signalled(schedule, step):\n"
        f"    if step == 2: os.kill(os.getpid(), {number.value})\n"
        "    return key(schedule, step)\n"
        "session.Schedule.key = signalled\n"
        "sys.exit(main())\n"
    )
    words = ["train-drafter", str(answered), "-o", str(to), "--overwrite", "--layers=1"]
    words += ["--block=4", "--taps=0,2", "--rank=8", "--steps=6"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], check=False, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == (
        "dspark-batch: stopped; without --overwrite the same command goes on with what is there"
    )
    assert Place(str(to)).state().step == 2
    train_drafter([str(answered)], str(to), SMALL)
    assert_same_weights(whole[0], to)


def test_a_stop_behind_the_last_step_leaves_measuring_to_the_next_start(whole, answered, tmp_path):
    to, stops = str(tmp_path / "drafter"), iter([False] * 5 + [True])
    with pytest.raises(Resumable, match="stopped as asked after step 6 of 6; the same command"):
        train_drafter([str(answered)], to, SMALL, stop=lambda: next(stops))
    assert train_drafter([str(answered)], to, SMALL).after == whole[1].after
    assert_same_weights(whole[0], tmp_path / "drafter")


def test_a_stop_between_two_points_of_the_curve_changes_none(
    whole, answered, tmp_path, monkeypatch
):
    monkeypatch.setattr(session, "_CURVE_POINTS", 2)
    to, stops = str(tmp_path / "drafter"), iter([False, True])
    with pytest.raises(Resumable, match="stopped as asked after step 2 of 6; the same command"):
        train_drafter([str(answered)], to, SMALL, stop=lambda: next(stops))
    training = train_drafter([str(answered)], to, SMALL)
    assert_same_weights(whole[0], tmp_path / "drafter")
    assert [point["step"] for point in training.curve] == [3, 6]
    losses = [point["loss"] for point in whole[1].curve]
    assert training.curve[0]["loss"] == pytest.approx(sum(losses[:3]) / 3)


def test_a_drafter_is_gone_on_with_and_measured_before_and_after(whole, answered, tmp_path):
    asked = Asked(init=str(whole[0]), steps=2, by="kind")
    training = train_drafter([str(answered)], str(tmp_path / "more"), asked)
    assert training.before["all"] == whole[1].after["all"]
    assert {"all"} < training.after.keys() <= {"all", "one", "two"}
    old, new = weights_of(whole[0]), weights_of(tmp_path / "more")
    assert mx.array_equal(old["embed_tokens.weight"], new["embed_tokens.weight"])
    assert not mx.array_equal(old["fc.weight"], new["fc.weight"])


def test_the_targets_ends_are_stored_and_shared_with_it(whole, target):
    stored, its = weights_of(whole[0]), weights_of(target)["model.embed_tokens.weight"]
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert mx.array_equal(stored[name].astype(mx.float32), its)
    pair = load_pair(target=str(target), drafter=str(whole[0]))
    config = pair.drafter.config
    assert (config.own_embedding, config.own_head) == (False, False)


def test_the_mask_token_occurs_nowhere_and_has_an_embedding(answered, whole):
    config = json.loads((whole[0] / "config.json").read_text())
    embedding = mx.ones((8, 4))
    embedding[6] = 0
    seen = SimpleNamespace(seen=lambda size: np.array([1, 1, 1, 0, 0, 1, 0, 1], bool))
    assert session._mask_token(embedding, seen, frozenset([4])) == 3
    rows = rows_in(answered)
    assert all(config["mask_token_id"] not in row["token_ids"] for row in rows)


def test_the_page_of_a_training_has_its_curves_and_what_was_before(whole, answered, tmp_path):
    page = (whole[0] / "report.html").read_text()
    assert page.count("<svg") == 3
    assert f"<b>{whole[1].after['all']['accept_length']:.2f}</b>" in page
    assert "<span>before</span>" not in page


def test_a_dflash_drafter_has_neither_head(answered, tmp_path):
    asked = Asked(kind="dflash", layers=1, taps=(1,), steps=1)
    train_drafter([str(answered)], str(tmp_path / "d"), asked)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (config["markov_rank"], config["enable_confidence_head"]) == (0, False)
    assert not [
        name for name in weights_of(tmp_path / "d") if "head." in name and "lm_" not in name
    ]


def test_held_out_answers_are_never_learnt(answered, whole):
    place = Place(str(whole[0]))
    corpus = session.gather([look(str(answered))], None, place.work, by=None, most_tokens=256)
    assert not set(corpus.learnt) & set(corpus.held_out)
    assert len(corpus.learnt) + len(corpus.held_out) == 40
    assert (whole[1].answers, whole[1].held_out) == (len(corpus.learnt), len(corpus.held_out))
    assert isinstance(corpus, Corpus)


def test_one_record_is_held_out_where_chance_holds_out_none(
    answered, target, tmp_path, monkeypatch
):
    monkeypatch.setattr("dspark_batch.train.corpus._HELD_OUT", 1 << 60)
    opened = open_reading(look(str(answered)).spec)
    reads = Rendering(opened.render, opened.context_length)
    corpus = session.gather([look(str(answered))], reads, tmp_path, by=None, most_tokens=256)
    assert (len(corpus.learnt), len(corpus.held_out)) == (39, 1)


def test_a_training_goes_from_cross_entropy_to_the_mix_of_its_kind(whole):
    steps = whole[1].about["steps"]
    for point in whole[1].curve:
        done = point["step"] / steps
        drafted = (1 - 0.9 * done) * point["cross_entropy"] + 0.9 * done * point["distance"]
        assert point["loss"] == pytest.approx(drafted + point["doubt"], rel=1e-4)


def test_the_chance_of_a_step_is_its_own(whole):
    schedule = session.Schedule(steps=9, peak_lr=1.0, warmup=1, seed=7)
    keys = {tuple(schedule.key(step).tolist()) for step in range(1, 10)}
    assert len(keys) == 9


def test_the_rule_of_sizes_gives_what_deepspec_chose():
    facts = SimpleNamespace(hidden_size=2560, num_layers=36)
    sizes = sizes_for(facts, Asked())
    assert (sizes.layers, sizes.block, sizes.rank) == (5, 7, 256)
    assert sizes.taps == (1, 9, 17, 25, 33)
    assert sizes_for(SimpleNamespace(hidden_size=64, num_layers=1), Asked()).taps == (0,)


def damaged(answered, tmp_path, change):
    """A copy of a finished run whose manifest says something else."""
    out = tmp_path / "other.jsonl"
    shutil.copy(answered, out)
    shutil.copytree(f"{answered}.run", f"{out}.run")
    path = tmp_path / "other.jsonl.run" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return str(out)


def test_runs_of_two_targets_are_refused(answered, tmp_path):
    other = damaged(answered, tmp_path, lambda m: m["identity"].update(target="0123456789abcdef0"))
    with pytest.raises(
        UsageError, match=r"other.jsonl is a run of another target than .*out.jsonl"
    ):
        train_drafter([str(answered), other], str(tmp_path / "d"))


def test_a_run_of_a_target_that_has_changed_is_refused(answered, tmp_path):
    other = damaged(answered, tmp_path, lambda m: m["identity"].update(target="0123456789abcdef0"))
    with pytest.raises(UsageError, match=r"is a run of another target: .* 0123456789ab… then"):
        train_drafter([other], str(tmp_path / "d"))


def test_an_output_without_its_run_is_refused(answered, tmp_path):
    shutil.copy(answered, tmp_path / "alone.jsonl")
    with pytest.raises(UsageError, match="no job here"):
        train_drafter([str(tmp_path / "alone.jsonl")], str(tmp_path / "d"))
    assert not list(tmp_path.glob("d*"))


def test_rows_without_token_ids_are_refused(answered, tmp_path, monkeypatch):
    import dspark_batch.train.corpus as corpus

    taught = corpus.taught
    monkeypatch.setattr(
        corpus,
        "taught",
        lambda record, entry, *rest: taught(record, _without(entry, "token_ids"), *rest),
    )
    with pytest.raises(UsageError, match="has no token_ids, which a drafter learns from"):
        train_drafter([str(answered)], str(tmp_path / "d"), SMALL)


def _without(entry, column):
    return replace(entry, row={k: v for k, v in entry.row.items() if k != column})


def test_a_run_of_which_nothing_is_finished_is_refused(target, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": 1}\n' * 3)
    spec = Spec(
        inputs=(str(tmp_path / "in.jsonl"),), out=str(tmp_path / "o.jsonl"), target=str(target)
    )
    run(spec)
    with pytest.raises(UsageError, match=r"0 answers to learn from, .* \(3 without an answer\)"):
        train_drafter([spec.out], str(tmp_path / "d"), SMALL)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Asked(init="x", layers=2), "--layers is for a new drafter, and --init x has its own"),
        (Asked(kind="dflash", rank=8), "a DFlash drafter has no Markov head"),
        (Asked(taps=(2, 1)), "--taps is 2,1, expected rising layer numbers"),
        (Asked(taps=(0, 4)), "from -1 (the embedding) to 3"),
        (Asked(by="colour", steps=1), "--by colour: .* has no such column"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(answered, tmp_path, asked, sentence):
    with pytest.raises(UsageError) as refused:
        train_drafter([str(answered)], str(tmp_path / "d"), asked)
    import re

    assert re.search(sentence.replace("(", r"\(").replace(")", r"\)"), str(refused.value))


def test_a_mistaken_option_may_be_left_out_where_nothing_was_trained(answered, tmp_path):
    with pytest.raises(UsageError, match="or leave --by out"):
        train_drafter([str(answered)], str(tmp_path / "d"), Asked(by="colour", steps=1))
    assert train_drafter([str(answered)], str(tmp_path / "d"), Asked(steps=1)).about["steps"] == 1


def test_another_training_is_not_gone_on_with(whole, answered, tmp_path):
    shutil.copytree(f"{whole[0]}.run", tmp_path / "d.run")
    with pytest.raises(ResumeMismatch, match="seed is 0 there and 5 here"):
        train_drafter([str(answered)], str(tmp_path / "d"), Asked(seed=5, steps=6))
    (tmp_path / "e").mkdir()
    with pytest.raises(UsageError, match="exists, and no training here made it"):
        train_drafter([str(answered)], str(tmp_path / "e"), SMALL)
    with RunDir(str(tmp_path / "f")).lock(), pytest.raises(OutputInUse):
        train_drafter([str(answered)], str(tmp_path / "f"), SMALL)


def test_a_training_of_an_earlier_version_is_not_gone_on_with(whole, answered, tmp_path):
    shutil.copytree(f"{whole[0]}.run", tmp_path / "d.run")
    path = tmp_path / "d.run" / "plan.json"
    plan = json.loads(path.read_text())
    del plan["optimizer"]
    path.write_text(json.dumps(plan))
    with pytest.raises(
        ResumeMismatch, match="optimizer is None there and Muon by size and AdamW here"
    ):
        train_drafter([str(answered)], str(tmp_path / "d"), SMALL)


def test_a_loss_that_is_no_number_ends_the_training(answered, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "DSPARK", replace(session.DSPARK, cross_entropy=float("nan")))
    with pytest.raises(ModelError, match="the loss was no number up to step 1 of 6"):
        train_drafter([str(answered)], str(tmp_path / "d"), SMALL)
    assert not (tmp_path / "d").exists()
    assert Place(str(tmp_path / "d")).state() is None


def test_overwrite_starts_over_whatever_a_crash_left(whole, answered, tmp_path):
    shutil.copytree(f"{whole[0]}.run", tmp_path / "d.run")
    shutil.copytree(whole[0], tmp_path / "d.run" / "drafter")  # it died while it was storing
    train_drafter([str(answered)], str(tmp_path / "d"), SMALL, overwrite=True)
    assert_same_weights(whole[0], tmp_path / "d")
    assert not (tmp_path / "d.run" / "drafter").exists()


def test_a_drafter_goes_to_the_hub_as_a_model(whole):
    calls = []
    hub = SimpleNamespace(
        create_repo=lambda repo, **how: calls.append(how) or f"hub/{repo}",
        upload_folder=lambda **how: calls.append(how),
    )
    assert push_drafter(str(whole[0]), "me/d", private=True, hub=hub) == "hub/me/d"
    assert [call["repo_type"] for call in calls] == ["model", "model"]
    card = (whole[0] / "README.md").read_text()
    assert "| all |" in card
    assert str(whole[0].parent) not in card
