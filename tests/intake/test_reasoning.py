"""The thinking of an answer has a column of its own, and stays out of what comes later."""

import pytest
from fakes import fake_answer, fake_opener, fake_render
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.types import Item, Request, Said


def split(text):
    """Take the first three characters of an answer for the thinking."""
    return Said(text[:3], text[3:])


def answer_to(*messages):
    ids = fake_render([dict(zip(("role", "content"), each, strict=True)) for each in messages])
    return fake_answer(Request(Item(0, "0", "", ""), tuple(ids), 512))


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_reasoning_and_answer_are_two_columns_and_the_ids_are_of_both(tmp_path, name):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    start(tmp_path, opener=fake_opener(split=split), out=str(tmp_path / name))
    [row] = rows_in(tmp_path / name)
    said = answer_to(("user", "a"))
    assert (row["reasoning"], row["completion"]) == (said.text[:3], said.text[3:])
    assert row["token_ids"] == list(said.token_ids)
    assert row["usage"]["completion_tokens"] == len(said.token_ids)


def test_an_answer_without_thinking_has_none(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    start(tmp_path)
    [row] = rows_in(tmp_path / "out.jsonl")
    assert (row["reasoning"], row["completion"]) == (None, answer_to(("user", "a")).text)


def test_the_next_turn_hears_the_answer_without_its_reasoning(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"turns": ["a", "b"]})
    start(tmp_path, opener=fake_opener(split=split))
    [row] = rows_in(tmp_path / "out.jsonl")
    first = answer_to(("user", "a")).text[3:]
    second = answer_to(("user", "a"), ("assistant", first), ("user", "b")).text
    assert row["earlier_answers"] == [first]
    assert (row["reasoning"], row["completion"]) == (second[:3], second[3:])


def test_a_chat_response_has_it_beside_the_content_and_a_continued_text_has_none(tmp_path):
    chat = {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "a"}]}}
    text = {"url": "/v1/completions", "body": {"prompt": "a"}}
    write_lines(tmp_path / "in.jsonl", chat, text)
    start(tmp_path, opener=fake_opener(split=split), out=str(tmp_path / "o.jsonl"), format="openai")
    said, continued = (
        line["response"]["body"]["choices"][0] for line in rows_in(tmp_path / "o.jsonl")
    )
    whole = answer_to(("user", "a")).text
    assert said["message"] == {
        "role": "assistant",
        "content": whole[3:],
        "reasoning_content": whole[:3],
    }
    assert continued["text"] == fake_answer(Request(Item(0, "0", "", ""), (ord("a"),), 512)).text
