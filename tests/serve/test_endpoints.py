"""What a client sees: answers, streams, errors, in OpenAI's words."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import CONTEXT_LENGTH, FakeSteps, fake_steps_opener
from serving import Served, batch_line, chat, events_of, jsonl, said_in, served, wait_for
from small_jobs import rows_in, start, write_lines

from dspark_batch.serve.asking import asked_in
from dspark_batch.types import Said


def test_an_answer_is_the_body_that_a_job_writes(server, tmp_path):
    body = chat("Name a sea.", max_tokens=9)
    live = server.http.post("/v1/chat/completions", json=body).json()
    write_lines(tmp_path / "in.jsonl", batch_line("a", body))
    start(tmp_path, format="openai")
    (row,) = rows_in(tmp_path / "out.jsonl")
    theirs = row["response"]["body"]
    for each in (live, theirs):
        assert each.pop("id").startswith("chatcmpl-")
        assert each.pop("created") > 0
        each.pop("metrics")
    assert live == theirs


@pytest.mark.parametrize("has_usage", [True, False])
def test_a_stream_is_the_answer_in_pieces(server, has_usage):
    body = chat("Name a sea.")
    whole = server.http.post("/v1/chat/completions", json=body).json()
    options = {"stream_options": {"include_usage": True}} if has_usage else {}
    streamed = server.http.post("/v1/chat/completions", json=body | {"stream": True} | options)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    first, *events, done = events_of(streamed.text)
    assert done == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert said_in(events) == ("", whole["choices"][0]["message"]["content"])
    assert len({e["id"] for e in (first, *events)}) == 1
    assert all(e["object"] == "chat.completion.chunk" for e in events)
    if has_usage:
        *events, last = events
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
        assert all(e["usage"] is None for e in events)
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert all(e["choices"][0]["finish_reason"] is None for e in events[:-1])
    assert len(events) >= 2  # a slow reader has larger pieces


def test_texts_are_completed_each_as_a_choice_of_its_own(server):
    def texts(prompt, **more):
        body = {"prompt": prompt, "max_tokens": 5} | more
        return server.http.post("/v1/completions", json=body)

    one, two = (texts(t).json() for t in ("Once", "Twice"))
    both = texts(["Once", "Twice"]).json()
    assert [c["index"] for c in both["choices"]] == [0, 1]
    assert [c["text"] for c in both["choices"]] == [x["choices"][0]["text"] for x in (one, two)]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert both["usage"][name] == one["usage"][name] + two["usage"][name]
    ids = texts([ord(c) for c in "Once"]).json()
    assert ids["choices"] == one["choices"]
    assert texts([[ord(c) for c in "Once"], [5]]).json()["choices"][0] == one["choices"][0]
    events = events_of(texts(["Once", "Twice"], stream=True).text)
    by_index = ["", ""]
    for event in events[:-1]:
        by_index[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert by_index == [c["text"] for c in both["choices"]]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"logprobs": True, "top_logprobs": 50}, "`body.top_logprobs` is 50, expected 0 to 20."),
        ({"prompt_logprobs": 1, "stream": True}, "`prompt_logprobs` do not come in a stream"),
    ],
)
def test_log_probabilities_that_cannot_be_told_are_refused(server, asked, says):
    reply = server.http.post("/v1/chat/completions", json=chat("a", **asked))
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


def test_reasoning_is_told_apart_in_a_stream_as_in_an_answer(tmp_path):
    def split(text):
        """Reason up to the first 7, as a model with marks does."""
        reasoning, mark, answer = text.partition("7")
        return Said(reasoning, answer) if mark else Said(text, "")

    opener = fake_steps_opener()
    with served(tmp_path, opener=lambda: opener()._replace(split=split, marks=["7"])) as server:
        for question in map(str, range(12)):
            message = server.http.post("/v1/chat/completions", json=chat(question)).json()
            message = message["choices"][0]["message"]
            streamed = server.http.post("/v1/chat/completions", json=chat(question, stream=True))
            said = said_in(events_of(streamed.text))
            assert said == (message["reasoning_content"], message["content"])


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"{", 400, None, "invalid_json"),
        (b"[]", 400, None, "invalid_json"),
        (b"\xff", 400, None, "invalid_json"),
        (b'{"messages": [], "n": 1, "n": 1}', 400, None, "invalid_json"),
        (b'{"metadata": %s%s}' % (b"[" * 300, b"]" * 300), 400, None, "invalid_json"),
        ({}, 400, "messages", "invalid_value"),
        (chat("a") | {"model": "gpt-5"}, 404, "model", "model_not_found"),
        (chat("a") | {"model": 5}, 404, "model", "model_not_found"),
        (chat("a", stream="yes"), 400, "stream", "invalid_value"),
        (chat("a", stream_options=[]), 400, "stream_options", "invalid_value"),
        (chat("a", n=2), 400, "n", "unsupported"),
        (chat("a", tools=[{"type": "function"}]), 400, "tools", "unsupported"),
        (chat("a", suffix="x"), 400, "suffix", "unsupported"),
        (chat("a", wisdom=1), 400, "wisdom", "unsupported"),
        (chat("a", temperature=-1), 400, "temperature", "invalid_value"),
        (chat("a", logit_bias={"99999999": 1}), 400, "logit_bias", "invalid_value"),
        (chat("a" * CONTEXT_LENGTH), 400, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "messages", "invalid_value"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_and_never_ignored(
    server, body, status, param, code, stream
):
    if isinstance(body, dict) and stream:
        body = {"stream": True} | body
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = server.http.post("/v1/chat/completions", content=content)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"][-1] == "."


@pytest.mark.parametrize("prompt", [None, "", [], [1.5], [-1], [2**31], ["a", 5], [[]], [True]])
def test_a_prompt_that_is_none_is_refused(server, prompt):
    reply = server.http.post("/v1/completions", json={"prompt": prompt})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("query", ["limit=0", "limit=x", f"limit={'9' * 5000}", "order=up"])
def test_a_part_of_a_list_that_cannot_be_is_refused(server, query):
    for path in ("/v1/files", "/v1/batches"):
        reply = server.http.get(f"{path}?{query}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, query.split("=")[0])


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/models/gpt-5"])
def test_what_is_not_there_says_so_in_the_same_shape(server, path):
    reply = server.http.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert server.http.put("/v1/files").status_code == 405


def test_the_model_has_the_names_that_it_was_given(tmp_path):
    with served(tmp_path, names=("org/big", "small")) as server:
        names = [each["id"] for each in server.http.get("/v1/models").json()["data"]]
        assert names == ["org/big", "small"]
        assert server.http.get("/v1/models/org/big").json()["id"] == "org/big"
        for name in names:
            reply = server.http.post("/v1/chat/completions", json=chat("a") | {"model": name})
            assert reply.json()["model"] == "org/big"


def test_a_seed_repeats_an_answer_and_without_one_it_is_drawn_anew(server):
    hub = server.server.hub

    def noise(**more):
        body = chat("a", temperature=1.0) | more
        (request,) = asked_in(body, "/v1/chat/completions", server.service, hub).requests
        return request.sampling.seed, request.item.custom_id, request.item.digest

    assert noise(seed=5) == noise(seed=5) == noise(seed=5, stream=True)
    assert noise(seed=5) != noise(seed=6)
    assert noise() != noise()


def test_when_too_many_wait_the_next_is_asked_to_come_again(tmp_path):
    engine = FakeSteps(slots=1, pause_s=0.05)
    with served(tmp_path, engine, max_waiting=1) as server:
        body = chat("a", stream=True)
        with (
            server.http.stream("POST", "/v1/chat/completions", json=body) as first,
            server.http.stream("POST", "/v1/chat/completions", json=body) as second,
        ):
            third = server.http.post("/v1/chat/completions", json=body)
            assert third.status_code == 429
            assert third.json()["error"]["type"] == "rate_limit_error"
            assert int(third.headers["retry-after"]) > 0
            assert [r.read()[-8:] for r in (first, second)] == [b"[DONE]\n\n"] * 2
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(tmp_path, stream):
    with served(tmp_path, FakeSteps(pause_s=0.1), request_timeout=0.05) as server:
        reply = server.http.post("/v1/chat/completions", json=chat("a", stream=stream))
        error = events_of(reply.text)[-1] if stream else reply.json()
        assert reply.status_code == (200 if stream else 408)
        assert error["error"]["code"] == "timeout"
        wait_for(lambda: server.http.get("/health").json()["running"] == 0)


def test_a_stream_whose_tokens_have_no_text_ends_with_an_error(tmp_path):
    def decode(token_ids):
        raise ValueError(f"no text for {token_ids[0]}")

    # Else the answer may end before anybody asks for a part of it.
    opener = fake_steps_opener(FakeSteps(pause_s=0.1))
    with served(tmp_path, opener=lambda: opener()._replace(decode=decode)) as server:
        text = server.http.post("/v1/chat/completions", json=chat("a", stream=True)).text
    assert events_of(text)[-1]["error"]["code"] == "engine"


def test_whoever_is_not_answered_within_the_grace_hears_that_the_server_stops(tmp_path):
    with served(tmp_path, FakeSteps(pause_s=0.6)) as server, ThreadPoolExecutor() as pool:
        path, body = "/v1/chat/completions", chat("a")
        whole = pool.submit(server.http.post, path, json=body)
        with server.http.stream("POST", path, json=chat("a", stream=True)) as stream:
            wait_for(lambda: server.http.get("/health").json()["running"] == 2)
            server.server.stop()
            last = events_of(stream.read().decode())[-1]
        assert last["error"]["code"] == "stopping"
        assert whole.result().status_code == 503


def test_a_client_that_waits_hears_that_the_server_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark_batch.serve.answering._KEEP_ALIVE_S", 0.02)
    with served(tmp_path, FakeSteps(pause_s=0.1)) as server:
        text = server.http.post("/v1/chat/completions", json=chat("a", stream=True)).text
    assert ": keep-alive\n\n" in text
    assert events_of(text)[-1] == "[DONE]"


def test_while_the_model_loads_batches_are_taken_and_questions_are_not(tmp_path):
    may_load, opener = threading.Event(), fake_steps_opener()

    def slowly():
        assert may_load.wait(20)
        return opener()

    server = Served(tmp_path, slowly)
    try:
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
        reply = server.http.post("/v1/chat/completions", json=chat("a"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "loading")
        files = {"file": ("in.jsonl", jsonl(batch_line("a", chat("a"))))}
        upload = server.http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
        asked = {"input_file_id": upload["id"], "endpoint": "/v1/chat/completions"}
        asked |= {"completion_window": "24h"}
        batch = server.http.post("/v1/batches", json=asked).json()
        assert batch["status"] == "validating"
        may_load.set()
        url = f"/v1/batches/{batch['id']}"
        wait_for(lambda: server.http.get(url).json()["status"] == "completed")
    finally:
        may_load.set()
        server.close()


def test_a_server_that_is_stopped_while_it_loads_stops_at_once(tmp_path):
    may_load = threading.Event()

    def slowly():
        may_load.wait(20)
        raise OSError("too late")

    server = Served(tmp_path, slowly)
    try:
        files = {"file": ("in.jsonl", jsonl(batch_line("a", chat("a"))))}
        upload = server.http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
        asked = {"input_file_id": upload["id"], "endpoint": "/v1/chat/completions"}
        server.http.post("/v1/batches", json=asked | {"completion_window": "24h"})
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 10  # and not the 20 s of the load
        assert server.error is None
    finally:
        may_load.set()


def test_a_round_that_does_not_end_is_told(tmp_path, monkeypatch):
    with served(tmp_path, FakeSteps(pause_s=0.3)) as server:
        monkeypatch.setattr("dspark_batch.serve.app._LONGEST_ROUND_S", 0.1)
        body = chat("a", stream=True)
        with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
            wait_for(lambda: server.http.get("/health").json()["status"] == "stuck")
            reply.read()
        monkeypatch.undo()
        wait_for(lambda: server.http.get("/health").status_code == 200)


def test_metrics_count_what_was_done(tmp_path):
    with served(tmp_path) as server:
        body = server.http.post("/v1/chat/completions", json=chat("a")).json()
        lines = server.http.get("/metrics").text.splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(told["dspark:generation_tokens_total"]) == body["usage"]["completion_tokens"]
    assert int(told["dspark:prompt_tokens_total"]) == body["usage"]["prompt_tokens"]
    assert int(told["dspark:time_to_first_token_seconds_count"]) == 1
    assert told['dspark:time_to_first_token_seconds_bucket{le="+Inf"}'] == "1"
    assert int(told["dspark:num_requests_running"]) == 0


def test_a_url_that_is_none_is_told_the_one_that_clients_need(server):
    for path in ("/", "/chat/completions", "/v1/v1/models"):
        reply = server.http.get(path)
        assert (reply.status_code, "/v1/models is there" in reply.text) == (404, True)
    reply = server.http.get("/v1/chat/completions")
    assert (reply.status_code, "POST is" in reply.text) == (405, True)


def test_an_upload_that_is_no_form_is_told_how_to_send_one(server):
    reply = server.http.post("/v1/files", content=b"{}", headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    assert "curl -F file=@requests.jsonl -F purpose=batch" in reply.json()["error"]["message"]


def test_a_refusal_names_the_option_of_the_server_not_of_a_job(server):
    reply = server.http.post("/v1/chat/completions", json=chat("a", colour="red"))
    assert "start the server with --ignore-fields colour" in reply.json()["error"]["message"]
