"""The recipe of the real pair: which answers it makes, and what drafters are compared on."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dspark_batch.tiny
from dspark_batch import Spec, run
from dspark_batch.intake.reader import digest_of
from dspark_batch.train import corpus
from dspark_batch.train_drafter import Asked, train_drafter
from recipes.smollm2 import held_out, recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # checkpoints, families

# A text may have what only str.splitlines takes for the end of a line.
RECORDS = [{"prompt": f"number {i}\u2028", "source": "ab"[i % 2]} for i in range(24)]
TINY = Path(dspark_batch.tiny.__path__[0]) / "target"


def test_runs_begin_at_different_prompts_and_each_answers_all(tmp_path, monkeypatch):
    specs = []
    monkeypatch.setattr(
        recipe, "run", lambda spec: specs.append(spec) or SimpleNamespace(completion_tokens=0)
    )
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS))
    recipe.answer(tmp_path, recipe.Plan(prompts=(str(prompts),)))
    parts = [Path(spec.inputs[0]).read_bytes().splitlines() for spec in specs]
    assert [spec.temperature for spec in specs] == list(recipe.TEMPERATURES)
    assert parts[0] == parts[1][16:] + parts[1][:16] == parts[2][8:] + parts[2][:8]
    assert sorted(parts[0]) == sorted(prompts.read_bytes().splitlines()) != parts[0]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A recipe's folder: a target, a greedy run, a sampled one and a drafter."""
    import checkpoints
    import families

    config = families.family("llama", vocab_size=1536, tie_word_embeddings=True, eos_token_id=2)
    target = checkpoints.write_target(tmp_path / "target", config)
    for path in TINY.glob("tokenizer*"):
        shutil.copy(path, target)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    for number, temperature in enumerate((0.0, 0.7)):
        run(
            Spec(
                inputs=(str(tmp_path / "prompts.jsonl"),),
                out=str(tmp_path / f"answers-{number}.jsonl"),
                target=str(target),
                temperature=temperature,
                max_tokens=16,
                stop=("e",),
                slots=8,
            )
        )
    monkeypatch.setattr("dspark_batch.train.sizes._CPU_TOKENS", 256)
    monkeypatch.setattr(corpus, "_HELD_OUT", 2)
    asked = Asked(layers=1, block=4, taps=(0, 2), rank=8, steps=1)
    train_drafter(held_out.outs_of(tmp_path), str(tmp_path / "drafter"), asked)
    return tmp_path


def test_drafters_are_compared_on_ended_greedy_answers_of_prompts_never_seen(made):
    reports = held_out.compare(made, ("drafter",), "source", most=100)["drafter"]
    rows = map(json.loads, (made / "answers-0.jsonl").read_bytes().splitlines())
    lines = (made / "prompts.jsonl").read_bytes().splitlines()
    expected = {"all": 0, "a": 0, "b": 0}
    for row, line in zip(rows, lines, strict=True):
        never_seen = corpus.is_held_out(digest_of(line))
        if row["finish_reason"] == "stop" and never_seen and len(row["token_ids"]) > 1:
            for group in ("all", row["source"]):
                expected[group] += len(row["token_ids"]) - 1
    assert 0 < expected["all"] < 24 * 15
    assert {group: report["tokens"] for group, report in reports.items()} == expected


def test_drafters_are_compared_on_the_same_drawn_answers_to_prompts_never_seen(made):
    shutil.copytree(made / "drafter", made / "twin")
    shutil.copy(made / "prompts.jsonl", made / "prompts-0.jsonl")
    reports = held_out.draw(made, ("drafter", "twin"), "source", max_tokens=16, slots=4)
    rows = [json.loads(line) for line in (made / "drawn-drafter.jsonl").read_bytes().splitlines()]
    lines = (made / "prompts.jsonl").read_bytes().splitlines()
    never_seen = [json.loads(line) for line in lines if corpus.is_held_out(digest_of(line))]
    assert [row["prompt"] for row in rows] == [record["prompt"] for record in never_seen]
    rounds = [row["metrics"]["speculative_decoding"]["num_spec_steps"] for row in rows]
    groups = {"all"} | {record["source"] for record in never_seen}
    assert groups <= reports["drafter"].keys() <= groups | {held_out.ENDED}
    assert reports["drafter"]["all"]["rounds"] == sum(rounds) > 0
    assert reports["drafter"]["all"]["tokens"] == sum(len(row["token_ids"]) - 1 for row in rows)
    assert reports["drafter"] == reports["twin"]


def test_a_drafter_that_was_trained_anew_is_measured_anew(made):
    (made / "prompts-0.jsonl").write_bytes((made / "prompts.jsonl").read_bytes() + b"no JSON\n")
    config = json.loads((made / "drafter" / "config.json").read_bytes())
    settings = {"max_tokens": 16, "slots": 4}
    before = held_out.draw(made, ("drafter",), "source", **settings)["drafter"]["all"]
    (made / "drafter" / "config.json").write_text(json.dumps(config | {"block_size": 2}))
    after = held_out.draw(made, ("drafter",), "source", **settings)["drafter"]["all"]
    assert [len(report["accept_rate"]) for report in (before, after)] == [4, 2]
    assert before["tokens"] == after["tokens"]


def test_no_prompt_may_be_held_out(made, monkeypatch):
    monkeypatch.setattr(held_out, "is_held_out", lambda digest: False)
    shutil.copy(made / "prompts.jsonl", made / "prompts-0.jsonl")
    assert held_out.draw(made, ("drafter",), None, max_tokens=16, slots=None) == {}
