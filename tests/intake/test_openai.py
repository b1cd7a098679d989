"""Files of the OpenAI Batch API go in as they are, and come out as they do there."""

import json

import pytest
from fakes import fake_render
from small_jobs import errors_in, rows_in, start, write_lines

from dspark_batch.intake.mapping import to_request
from dspark_batch.intake.openai import CHAT, COMPLETIONS
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item, Sampling

# As the guide of the Batch API has it.
PUBLISHED = (
    '{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": '
    '"gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are a helpful '
    'assistant."},{"role": "user", "content": "Hello world!"}],"max_tokens": 1000}}\n'
    '{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": '
    '"gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are an unhelpful '
    'assistant."},{"role": "user", "content": "Hello world!"}],"max_tokens": 1000}}\n'
)
CHAT_BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**body):
    return {"custom_id": "c", "method": "POST", "url": CHAT, "body": CHAT_BODY | body}


def completion(**body):
    return {"custom_id": "t", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "hi"} | body}


def ask(record, **options):
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", **options)

    return to_request(Item(0, "0", "d", "in.jsonl:1", record), spec, fake_render, 100)


def rendered(record, **options):
    return "".join(map(chr, ask(record, **options).prompt_ids))


def complaint(record, **options):
    failure = ask(record, **options)
    assert failure.code == "bad_record"
    return failure.message.removeprefix("in.jsonl:1: ")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in.jsonl").write_text(PUBLISHED)
    return tmp_path


def test_the_published_example_is_answered_in_its_own_shape(folder):
    assert start(folder, format="openai").exit_code == 0
    first, second = rows_in(folder / "out.jsonl")
    assert [*first] == ["id", "custom_id", "response", "error"]
    assert (first["custom_id"], second["custom_id"]) == ("request-1", "request-2")
    assert first["id"].startswith("batch_req_")
    assert first["id"] != second["id"]
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"]) == 12
    assert choice["finish_reason"] in ("stop", "length")
    assert body["usage"] == {
        "prompt_tokens": 54,
        "completion_tokens": 12,
        "total_tokens": 66,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["metrics"]["speculative_decoding"]["num_spec_steps"] == 4


def test_the_published_example_makes_rows_as_well(folder):
    start(folder, out=str(folder / "out.parquet"))
    rows = rows_in(folder / "out.parquet")
    assert [row["custom_id"] for row in rows] == ["request-1", "request-2"]
    assert rows[0]["body"]["max_tokens"] == 1000
    assert rows[0]["completion"]


def test_a_failure_is_an_error_line_at_its_place(tmp_path):
    write_lines(tmp_path / "in.jsonl", chat(tools=[{}]), b"nope", chat())
    assert start(tmp_path, format="openai").exit_code == 1
    bad, worse, good = rows_in(tmp_path / "out.jsonl")
    assert (bad["custom_id"], bad["response"]) == ("c", None)
    assert bad["error"]["code"] == "bad_record"
    assert "`body.tools` is [{}], which is not supported" in bad["error"]["message"]
    assert worse["error"]["code"] == "bad_record"
    assert good["response"]["status_code"] == 200


def test_a_completion_has_a_text_and_no_message(tmp_path):
    write_lines(tmp_path / "in.jsonl", completion())
    start(tmp_path, format="openai", target="org/model")
    [line] = rows_in(tmp_path / "out.jsonl")
    body = line["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "org/model")
    assert len(body["choices"][0]["text"]) == 12


def test_other_records_are_answered_in_the_same_format(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a", "status": "a column that does not matter"})
    start(tmp_path, format="openai")
    [line] = rows_in(tmp_path / "out.jsonl")
    assert line["response"]["body"]["object"] == "chat.completion"


def test_one_job_gives_the_same_bytes_however_often_it_stops(folder):
    start(folder, format="openai")
    whole = (folder / "out.jsonl").read_bytes()
    (folder / "out.jsonl").unlink()
    start(folder, format="openai")
    assert (folder / "out.jsonl").read_bytes() == whole


def test_a_request_chooses_its_sampling_and_the_job_the_rest():
    body = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a"], "max_tokens": 7}
    request = ask(chat(**body), top_k=5, max_tokens=9)
    assert request.max_tokens == 7
    assert request.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=5, seed=3, stop=("a",))
    assert ask(chat(), max_tokens=9).max_tokens == 9
    assert ask(chat(max_completion_tokens=8)).max_tokens == 8


def test_a_chat_is_rendered_and_a_text_is_continued_as_it_stands():
    assert rendered(chat()) == "user:hi\n"
    assert rendered(chat(), system_prompt="S") == "system:S\nuser:hi\n"
    assert rendered(completion()) == "hi"


def test_newer_words_of_a_message():
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
    ]
    told = rendered(chat(messages=messages), last_assistant="continue")
    assert told == "system:S\nuser:a\nb\nassistant:c\n"


@pytest.mark.parametrize(
    "field",
    [
        *({"user": "u"}, {"metadata": {"a": "b"}}, {"stream": False}, {"service_tier": "flex"}),
        *({"store": True}, {"n": 1}, {"logprobs": False}, {"tools": None}, {"tools": []}),
        *({"extra_body": {}}, {"extra_headers": {}}, {"add_special_tokens": False}),
        *({"response_format": {"type": "text"}}, {"parallel_tool_calls": True}),
        {"presence_penalty": 0.0},
    ],
)
def test_what_changes_nothing_is_accepted(field):
    assert ask(chat(**field)).prompt_ids == ask(chat()).prompt_ids


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (chat(n=2), "`body.n` is 2, which is not supported. Use --samples for several answers."),
        (chat(stream=True), "`body.stream` is True, which is not supported."),
        (chat(top_logprobs=3), "`body.top_logprobs` needs `logprobs` true beside it; add that."),
        (chat(logprobs=True, top_logprobs=50), "`body.top_logprobs` is 50, expected 0 to 20."),
        (
            chat(guided_json={"not": {}}),
            "`body.guided_json` has `not`, which is not supported; say it with other keywords.",
        ),
        (
            chat(response_format={"type": "xml"}),
            "`body.response_format` is {'type': 'xml'}, expected an object whose `type` is text, ",
        ),
        (chat(logit_bias={"5": 1000}), "`body`: logit_bias of token 5 is 1000, expected -100 to"),
        (chat(functions=[{}]), "`body.functions` is [{}], which is not supported."),
        (chat(max_token=3), "`body.max_token` is not supported; did you mean max_tokens."),
        (chat(temperature="hot"), "`body.temperature` is 'hot', expected a number."),
        (chat(temperature=-1), "`body`: temperature is -1, expected 0 or more."),
        (chat(max_tokens=0), "`body.max_tokens` is 0, expected 1 or more."),
        (
            chat(max_tokens=1, max_completion_tokens=2),
            "`body.max_completion_tokens` says `max_tokens` a second time; keep one of them.",
        ),
        (chat(messages=None), "`body.messages` is null, expected a list of messages."),
        (
            chat(messages=[{"role": "tool", "content": "x"}]),
            "`body.messages[0]` has the role 'tool', and tools are not supported; take it out.",
        ),
        (
            chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
            "`body.messages[0]` has `tool_calls`, which is not supported",
        ),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "`body.messages[0]` has a part that is image_url; only text is supported.",
        ),
        (completion(prompt=["a"]), "`body.prompt` is a list, expected a string."),
        (completion(prompt=""), "`body.prompt` is empty; there is nothing to continue."),
        (completion(echo=True), "`body.echo` is True, which is not supported."),
        (completion(messages=[]), "`body.messages` is not supported"),
        (chat(prompt="x"), "`body.prompt` is not supported"),
        (
            chat() | {"url": "/v1/embeddings"},
            "`url` is '/v1/embeddings', expected /v1/chat/completions or /v1/completions.",
        ),
        (chat() | {"method": "GET"}, "`method` is 'GET', expected 'POST'."),
    ],
)
def test_what_is_not_supported_fails_the_item_and_is_never_ignored(record, sentence):
    assert complaint(record).startswith(sentence)


def test_a_text_has_no_place_for_a_system_prompt():
    said = complaint(completion(), system_prompt="S")
    assert said == "a text to be continued has no place for --system-prompt."


def test_requests_from_parquet_have_nulls_where_others_have_fields(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([chat(n=1), completion()]), tmp_path / "in.parquet")
    start(tmp_path, inputs=(str(tmp_path / "in.parquet"),))
    assert errors_in(tmp_path / "out.jsonl") == [None, None]


def test_lines_are_json_that_others_read(folder):
    start(folder, format="openai")
    for line in (folder / "out.jsonl").read_text().splitlines():
        assert json.loads(line)["response"]["body"]["choices"][0]["index"] == 0
