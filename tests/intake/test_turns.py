"""User texts that are answered in turn: each answer becomes history for the next."""

import pytest
from fakes import FakeEngine, fake_answer, fake_render
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.intake.mapping import to_request
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item, Request

RECORDS = [
    {"id": "two", "turns": ["a", "b"]},
    *prompts("x"),
    {"id": "three", "turns": ["c", "d", "e"]},
    {"id": "one", "turns": ["f"]},
]


def answer_to(*messages):
    """What the fake says to a conversation that is written out."""
    ids = fake_render([dict(zip(("role", "content"), each, strict=True)) for each in messages])
    return fake_answer(Request(Item(0, "0", "", ""), tuple(ids), 512)).text


def in_turn(*questions):
    """The answers to questions one after the other."""
    said, answers = [], []
    for question in questions:
        said.append(("user", question))
        answers.append(answer_to(*said))
        said.append(("assistant", answers[-1]))
    return answers


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *RECORDS)
    return tmp_path


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_each_turn_is_asked_with_what_was_answered_before(folder, slots):
    assert start(folder, slots=slots).exit_code == 0
    two, prompt, three, one = rows_in(folder / "out.jsonl")
    assert [*two["earlier_answers"], two["completion"]] == in_turn("a", "b")
    assert [*three["earlier_answers"], three["completion"]] == in_turn("c", "d", "e")
    assert ([one["completion"]], one["earlier_answers"]) == (in_turn("f"), None)
    assert ([prompt["completion"]], prompt["earlier_answers"]) == (in_turn("x"), None)


def test_a_row_is_about_its_last_answer_but_what_it_used_is_that_of_all_turns(folder):
    start(folder, out=str(folder / "out.parquet"))
    row = rows_in(folder / "out.parquet")[0]
    first, second = in_turn("a", "b")
    asked = ["user:a\n", f"user:a\nassistant:{first}\nuser:b\n"]
    assert row["usage"] == {
        "prompt_tokens": len(asked[0]) + len(asked[1]),
        "completion_tokens": len(first) + len(second),
    }
    assert row["earlier_answers"] == [first]
    assert len(row["token_ids"]) == len(second)


def test_totals_count_every_turn(folder):
    ticks = []
    report = start(folder, observe=ticks.append)
    answers = [*in_turn("a", "b"), *in_turn("x"), *in_turn("c", "d", "e"), *in_turn("f")]
    tokens = sum(map(len, answers))
    assert (report.completion_tokens, report.new_tokens) == (tokens, tokens)
    assert ticks[-1].new_tokens == tokens
    speed = [row["metrics"]["speculative_decoding"] for row in rows_in(folder / "out.jsonl")]
    means = [each["mean_acceptance_length"] * each["num_spec_steps"] for each in speed]
    steps = sum(each["num_spec_steps"] for each in speed)
    assert report.mean_acceptance_length == pytest.approx(sum(means) / steps)


@pytest.mark.parametrize("dies_after", range(7))
def test_a_stop_between_turns_changes_nothing(folder, dies_after):
    start(folder, out=str(folder / "whole.jsonl"))
    try:
        start(folder, engine=FakeEngine(slots=2, dies_after=dies_after))
    except KeyboardInterrupt:
        start(folder)
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_a_turn_that_fails_fails_its_item_only(folder):
    length = 400 - len("user:a\nassistant:\nuser:\n") - 12
    record = {"id": "long", "turns": ["a", "b" * length]}
    write_lines(folder / "in.jsonl", record, *prompts("x"))
    start(folder)
    bad, good = rows_in(folder / "out.jsonl")
    assert bad["error"]["code"] == "prompt_too_long"
    assert good["status"] == "succeeded"


def test_every_turn_draws_with_noise_of_its_own():
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", temperature=1.0, seed=5)
    item = Item(0, "0", "d", "in.jsonl:1", {"turns": ["a", "a", "a"]})
    seeds = [
        to_request(item, spec, fake_render, 400, ("x",) * turn).sampling.seed for turn in range(3)
    ]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
