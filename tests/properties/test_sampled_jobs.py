"""A sampled job is reproduced, continued and sped up without another byte in its output."""

import json

import pytest
from golden_cases import load_case
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.engine.engine import Engine
from dspark_batch.opening import Opened
from dspark_batch.spec.spec import number_or_none


def open_tiny(spec, manifest):
    """The real engine on a recorded pair; its prompts are letters."""
    pair = load_case("qwen3_vanilla").pair
    slots, draft_length = map(number_or_none, (spec.slots, spec.draft_length))
    engine = Engine(pair, slots=slots or 1, draft_length=draft_length, sampling=spec.sampling)
    return Opened(engine, letters, pair.config.context_length, pair.config.identity)


def letters(messages):
    return [ord(c) for c in messages[-1]["content"]]


def stop_after(rows):
    def observe(tick):
        if tick.stage == "decode" and tick.done == rows:
            raise KeyboardInterrupt

    return observe


def answers(folder):
    rows = rows_in(folder / "out.jsonl")
    return [json.dumps({k: v for k, v in row.items() if k != "metrics"}) for row in rows]


def run(folder, **options):
    folder.mkdir(exist_ok=True)
    write_lines(
        folder / "in.jsonl",
        *prompts("one", "two", "three"),
        *prompts("four"),
        {"prompt": "one", "sampling_params": {"temperature": 0}},
        {"prompt": "one", "sampling_params": {"seed": 7, "max_tokens": 3}},
    )
    start(folder, opener=open_tiny, temperature=1.0, max_tokens=8, **options)
    return answers(folder)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_stopped_job_goes_on_with_other_settings_of_speed(tmp_path, rows):
    whole = run(tmp_path / "whole", draft_length=0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", slots=2, observe=stop_after(rows))
    assert run(tmp_path / "torn", slots=3, draft_length=4) == whole


def test_a_stopped_job_goes_on_under_the_rejection_rule_too(tmp_path):
    whole = run(tmp_path / "whole", sampling="rejection")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", sampling="rejection", slots=2, observe=stop_after(2))
    assert run(tmp_path / "torn", sampling="rejection", slots=3) == whole
    assert whole != run(tmp_path / "plain", draft_length=0)  # its answers are its own


def test_an_edited_input_is_answered_as_if_it_had_always_been_so(tmp_path):
    records = [{"prompt": "one"}, {"prompt": "two"}, *prompts("three")]
    options = {"opener": open_tiny, "temperature": 1.0, "max_tokens": 8}
    write_lines(tmp_path / "in.jsonl", *records)
    start(tmp_path, **options)
    write_lines(tmp_path / "in.jsonl", {"prompt": "new"}, *records)
    assert start(tmp_path, **options).resumed == 1  # the others' noise comes from their index
    start(tmp_path, out=f"{tmp_path}/fresh.jsonl", **options)
    edited = answers(tmp_path)
    (tmp_path / "fresh.jsonl").replace(tmp_path / "out.jsonl")
    assert answers(tmp_path) == edited
