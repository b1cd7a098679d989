"""The shortest and the longest prompts and answers, through the real engine on a recorded pair."""

import pytest
from golden_cases import load_case
from small_jobs import rows_in, start, write_lines

from dspark_batch.engine.engine import Engine
from dspark_batch.opening import Opened

CONTEXT = load_case("qwen3_vanilla").pair.config.context_length
PROMPT_LENGTHS = (1, 2, CONTEXT - 2, CONTEXT - 1, CONTEXT, CONTEXT + 1)


def opener(**settings):
    """Open the recorded pair with one token for each character, and nothing around a prompt."""
    pair = load_case("qwen3_vanilla").pair

    def render(messages):
        return [ord(character) for character in messages[-1]["content"]]

    engine = Engine(pair, **settings)
    return lambda spec, manifest: Opened(engine, render, CONTEXT, pair.config.identity)


def answers(folder, out, opener, max_tokens):
    start(folder, opener=opener, out=f"{folder}/{out}.jsonl", max_tokens=max_tokens)
    return [row | {"metrics": None} for row in rows_in(folder / f"{out}.jsonl")]


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_prompts_and_answers_at_every_limit_are_those_of_plain_decoding(tmp_path, max_tokens):
    text = ("The quick brown fox. " * CONTEXT)[: CONTEXT + 1]
    records = [{"prompt": text[:length]} for length in PROMPT_LENGTHS]
    write_lines(tmp_path / "in.jsonl", *records)
    plain = answers(tmp_path, "plain", opener(slots=1, draft_length=0), max_tokens)
    together = answers(tmp_path, "together", opener(slots=3, draft_length=7), max_tokens)
    assert together == plain
    asked = [min(max_tokens, CONTEXT - length) for length in PROMPT_LENGTHS]
    assert [len(row["token_ids"] or ()) for row in plain] == [max(0, room) for room in asked]
    assert [row["finish_reason"] for row in plain] == ["length"] * 4 + [None] * 2
    assert [row["error"] and row["error"]["code"] for row in plain] == [
        *(None, None, None, None, "prompt_too_long", "prompt_too_long")
    ]
