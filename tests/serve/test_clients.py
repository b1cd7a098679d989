"""Real clients, as they come from the registry: `openai`, `litellm` and `llm`."""

import json
import os
import subprocess
import sys
import textwrap

import openai
import pytest
from fakes import FakeSteps
from serving import batch_line, chat, jsonl, served, wait_for

KEY = "sesame"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served_slowly(tmp_path_factory.mktemp("data")) as one:
        yield one


def served_slowly(folder):
    engine = FakeSteps(slots=2, pause_s=0.002)
    return served(folder, engine, keys=("open", KEY), max_waiting=2)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key=KEY,
        max_retries=0,
        _strict_response_validation=True,
    ) as one:
        yield one


ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Name a sea."}]}


def test_openai_chats_streams_and_counts(client):
    whole = client.chat.completions.create(**ASKED)
    said = whole.choices[0].message.content
    stream = client.chat.completions.create(
        **ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    parts = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(filter(None, parts)) == said
    assert chunks[-1].usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_openai_completes_texts_and_finds_models(client):
    answer = client.completions.create(model="tiny", prompt=["Once", "Twice"])
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "dspark-batch"


def test_openai_raises_each_error_by_its_type(client, server):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED, n=3)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**ASKED | {"model": "gpt-5"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="guess").models.list()
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-0123456789abcdef")


def test_openai_has_an_error_in_a_stream_when_the_time_is_up(tmp_path):
    with served(tmp_path, FakeSteps(pause_s=0.05), request_timeout=0.12) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
        with pytest.raises(openai.APIError, match="no whole answer"):
            list(client.chat.completions.create(**ASKED, stream=True))


def test_openai_frees_a_slot_when_it_closes_a_stream(client, server):
    for _ in range(6):  # more than slots and places to wait
        stream = client.chat.completions.create(**ASKED, stream=True)
        next(iter(stream))
        stream.close()
    wait_for(lambda: server.http.get("/health").json()["running"] == 0)


def test_openai_is_told_to_come_again_when_too_many_wait(client, server):
    slow = {"max_tokens": 12}
    streams = [client.chat.completions.create(**ASKED, **slow, stream=True) for _ in range(2)]
    server.server.hub._engine.pause_s = 0.1
    try:
        streams += [client.chat.completions.create(**ASKED, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError):
            streams += [client.chat.completions.create(**ASKED, stream=True) for _ in range(3)]
    finally:
        server.server.hub._engine.pause_s = 0.002
        for stream in streams:
            stream.close()
    wait_for(lambda: server.http.get("/health").json()["running"] == 0)


def upload(client, *lines):
    return client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")


def asked(client, *lines, **more):
    file = upload(client, *lines)
    how = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
    return client.batches.create(input_file_id=file.id, **how)


def ended(client, batch):
    wait_for(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"))
    return client.batches.retrieve(batch.id)


def lines_of(client, file_id):
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_openai_uploads_asks_polls_and_downloads_a_batch(client):
    lines = [batch_line(f"q{n}", chat(f"Question {n}?")) for n in range(12)]
    lines.insert(5, batch_line("bad", chat("a", n=4)))
    batch = asked(client, *lines, metadata={"for": "a test"})
    assert batch.status in ("validating", "in_progress")
    batch = ended(client, batch)
    assert (batch.status, batch.metadata) == ("completed", {"for": "a test"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (13, 12, 1)
    answers = lines_of(client, batch.output_file_id)
    assert [line["custom_id"] for line in answers] == [f"q{n}" for n in range(12)]
    live = client.chat.completions.create(**chat("Question 7?"))
    (choice,) = answers[7]["response"]["body"]["choices"]
    assert choice["message"]["content"] == live.choices[0].message.content
    (failure,) = lines_of(client, batch.error_file_id)
    assert (failure["custom_id"], failure["error"]["code"]) == ("bad", "bad_record")


def test_openai_walks_through_files_and_batches_page_by_page(client):
    files = [upload(client, batch_line("a", chat("a"))) for _ in range(5)]
    listed = [file.id for file in client.files.list(limit=2, purpose="batch")]
    assert listed[:5] == [file.id for file in reversed(files)]
    batches = [asked(client, batch_line("a", chat("a"))) for _ in range(3)]
    for batch in batches:
        ended(client, batch)
    listed = [batch.id for batch in client.batches.list(limit=1)]
    assert listed[:3] == [batch.id for batch in reversed(batches)]
    assert client.files.delete(files[0].id).deleted
    assert files[0].id not in [file.id for file in client.files.list(order="asc")]
    assert client.files.retrieve(files[1].id).filename == "in.jsonl"


LITELLM = """
    import json, sys, time, warnings
    warnings.simplefilter("ignore")
    import litellm
    how = {"api_base": sys.argv[1], "api_key": "sesame"}
    ask = {"model": "openai/tiny", "messages": [{"role": "user", "content": "Name a sea."}]} | how
    whole = litellm.completion(**ask).choices[0].message.content
    parts = [c.choices[0].delta.content for c in litellm.completion(**ask, stream=True)]
    how["custom_llm_provider"] = "openai"
    file = litellm.create_file(file=open(sys.argv[2], "rb"), purpose="batch", **how)
    batch = litellm.create_batch(
        completion_window="24h", endpoint="/v1/chat/completions", input_file_id=file.id, **how)
    while batch.status != "completed":
        batch = litellm.retrieve_batch(batch_id=batch.id, **how)
        time.sleep(0.05)
    content = litellm.file_content(file_id=batch.output_file_id, **how).content
    try:
        litellm.completion(**ask | {"api_key": "guess"})
    except litellm.AuthenticationError:
        refused = True
    print(json.dumps([whole, "".join(filter(None, parts)), content.decode(), refused]))
"""


def run_client(program, *words, **environment):
    """Run a client in a process of its own, which neither asks nor warns."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_litellm_chats_streams_and_has_a_batch(server, client, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(batch_line("a", chat("Name a sea."))))
    url, path = f"{server.url}/v1", str(tmp_path / "in.jsonl")
    local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it asks the network
    whole, streamed, content, refused = json.loads(
        run_client(LITELLM, url, path, **local).splitlines()[-1]
    )
    said = client.chat.completions.create(**ASKED).choices[0].message.content
    assert whole == streamed == said
    (line,) = map(json.loads, content.splitlines())
    assert line["response"]["body"]["choices"][0]["message"]["content"] == said
    assert refused


def test_llm_prints_an_answer_streamed_and_whole(server, client, tmp_path):
    model = {"model_id": "sea", "model_name": "tiny", "api_base": f"{server.url}/v1"}
    model["api_key_name"] = "sea"
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    said = client.chat.completions.create(**ASKED).choices[0].message.content
    words = ["-m", "sea", "Name a sea.", "--key", KEY, "--no-log"]
    program = """
        import json, sys
        from llm.cli import cli
        for more in ([], ["--no-stream"]):
            cli(json.loads(sys.argv[1]) + more, standalone_mode=False)
    """
    printed = run_client(program, json.dumps(words), LLM_USER_PATH=str(tmp_path))
    assert printed.split() == [said, said]
