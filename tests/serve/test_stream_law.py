"""The law: a stream put together is the answer without a stream, and the row of a job."""

import asyncio
import json
import random
from pathlib import Path

import httpx
import pytest
from serving import batch_line, chat, events_of, said_in, served
from small_jobs import rows_in, write_lines

from dspark_batch.opening import open_pair
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec

HELD_OUT = Path(__file__).parents[2] / "sample_inputs" / "heldout.jsonl"
PROMPTS = [json.loads(line)["prompt"] for line in HELD_OUT.read_text().splitlines()]
ODD = [
    "Copy the following line: naïve café   名前 🙂",
    "Repeat: 👩‍👩‍👧 é \u200b ﷽ 𝄞",
    'Spell "🙂é" backwards.',
]
SLOTS = {"slots": 8, "max_tokens": 96}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with the bundled pair."""
    spec = Spec(inputs=("live",), out="-", **SLOTS)
    folder = tmp_path_factory.mktemp("data")
    opener = lambda: open_pair(spec, None)  # noqa: E731
    with served(folder, opener=opener, spec=SLOTS, max_waiting=1000) as one:
        yield one


def asked_all(server, bodies):
    """Ask all at once, streamed and whole; return what each said, and why it ended."""

    async def one(client, body, is_streamed):
        reply = await client.post("/v1/chat/completions", json=body | {"stream": is_streamed})
        if not is_streamed:
            (choice,) = reply.json()["choices"]
            return choice["message"]["content"], choice["finish_reason"]
        events = events_of(reply.text)
        assert events[-1] == "[DONE]"
        return said_in(events)[1], events[-2]["choices"][0]["finish_reason"]

    async def everything():
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            both = [one(client, body, streamed) for body in bodies for streamed in (True, False)]
            return await asyncio.gather(*both)

    said = asyncio.run(everything())
    return said[::2], said[1::2]


def test_a_streams_log_probabilities_are_those_of_the_answer(server):
    """Put together, whatever was held back, and where a stop string cut the text."""
    asked = {"logprobs": True, "top_logprobs": 2, "temperature": 0.9, "seed": 4}
    for prompt, more in [(ODD[0], {}), (ODD[1], {}), (PROMPTS[3], {"stop": ["e"]})]:
        body = chat(prompt) | asked | more
        url = "/v1/chat/completions"
        (whole,) = server.http.post(url, json=body).json()["choices"]
        events = events_of(server.http.post(url, json=body | {"stream": True}).text)
        told = [event["choices"][0]["logprobs"] for event in events[:-1]]
        content = [each for one in told if one for each in one["content"]]
        assert content == whole["logprobs"]["content"]
        assert said_in(events)[1] == whole["message"]["content"]
        assert sum(each is not None for each in told) > 1 or "stop" in body
        assert [len(each["top_logprobs"]) for each in content] == [2] * len(content)


def test_the_log_probabilities_of_a_streamed_text_are_those_of_the_text(server):
    body = {"prompt": "Letters: c a t", "logprobs": 1, "max_tokens": 24}
    (whole,) = server.http.post("/v1/completions", json=body).json()["choices"]
    streamed = server.http.post("/v1/completions", json=body | {"stream": True})
    told = [event["choices"][0]["logprobs"] for event in events_of(streamed.text)[:-1]]
    for name, values in whole["logprobs"].items():
        assert [value for one in told if one for value in one[name]] == values


def rows_of(folder, bodies):
    """Ask all in a job."""
    lines = [batch_line(f"q{n}", body) for n, body in enumerate(bodies)]
    path = write_lines(folder / "in.jsonl", *lines)
    run(Spec(inputs=(str(path),), out=str(folder / "out.jsonl"), format="openai", **SLOTS))
    choices = [row["response"]["body"]["choices"][0] for row in rows_in(folder / "out.jsonl")]
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in choices]


def stops_in(text, rng):
    """Find strings that an answer has, wherever its blocks end."""
    at = rng.randrange(max(1, len(text) - 8))
    return [text[at : at + rng.randint(1, 8)] or "x", "never said"]


@pytest.mark.parametrize(
    "prompts",
    [PROMPTS[::80] + ODD, pytest.param(PROMPTS + ODD, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_stream_is_the_answer_and_the_row_of_a_job(server, tmp_path, prompts):
    rng = random.Random(5)
    bodies = [chat(prompt) for prompt in prompts]
    streamed, whole = asked_all(server, bodies)
    assert streamed == whole
    texts = [text for text, _ in whole]
    stopped = [
        body | {"stop": stops_in(text, rng)} for body, text in zip(bodies, texts, strict=True)
    ]
    cut_streamed, cut_whole = asked_all(server, stopped)
    assert cut_streamed == cut_whole
    assert sum(a != b for a, b in zip(cut_whole, whole, strict=True)) > len(prompts) // 2
    assert rows_of(tmp_path, bodies + stopped) == whole + cut_whole


def test_text_that_is_no_text_streams_as_it_ends(server):
    bodies = [
        chat(prompt, temperature=2.5, seed=n, max_tokens=40, **more)
        for n, prompt in enumerate(ODD * 2)
        for more in ({}, {"stop": ["\ufffd", "é"]})
    ]
    streamed, whole = asked_all(server, bodies)
    assert streamed == whole
    assert any("\ufffd" in text for text, _ in whole)
