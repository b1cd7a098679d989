"""Conversations of every dialect follow one rule: obeyed, or refused, never dropped."""

import json

import pytest
from fakes import fake_render
from small_jobs import rows_in, start, write_lines

from dspark_batch.intake.mapping import ignored_in, said_in, to_request
from dspark_batch.intake.messages import Unusable
from dspark_batch.intake.question import num_turns, question_of
from dspark_batch.report import write_report
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item, Said

USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}


def named_render(messages):
    """A chat template that writes the names of speakers."""
    if isinstance(messages, str):
        return fake_render(messages)
    named = [m | {"role": f"{m['role']}({m['name']})"} if "name" in m else m for m in messages]
    return fake_render(named)


def in_messages(messages):
    return {"messages": messages}


def in_conversations(messages):
    return {"conversations": messages}


def in_prompt(messages):
    return {"prompt": messages, "chosen": [YES], "rejected": [YES]}


def in_body(messages):
    return {"url": "/v1/chat/completions", "body": {"model": "m", "messages": messages}}


def in_json_text(messages):
    return {"messages": json.dumps(messages)}


DIALECTS = [in_messages, in_conversations, in_prompt, in_body, in_json_text]


def in_sharegpt(message):
    words = {"user": "human", "assistant": "gpt"}
    said = {"from": words.get(message["role"], message["role"]), "value": message.get("content")}
    return said | {k: v for k, v in message.items() if k not in ("role", "content")}


@pytest.fixture(params=["openai", "sharegpt"])
def words(request):
    """Write messages in the words of OpenAI or of ShareGPT."""
    is_openai = request.param == "openai"
    return list if is_openai else lambda messages: list(map(in_sharegpt, messages))


def ask(record, render=fake_render, **options):
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", **options)
    return to_request(Item(0, "0", "d", "in.jsonl:1", record), spec, render, 300)


def told(record, **options):
    outcome = ask(record, **options)
    return "".join(map(chr, outcome.prompt_ids)) if hasattr(outcome, "prompt_ids") else None


def complaint(record, **options):
    failure = ask(record, **options)
    assert failure.code == "bad_record"
    return failure.message.removeprefix("in.jsonl:1: ")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([USER], "user:hi\n"),
        ([{"role": "developer", "content": "S"}, USER], "system:S\nuser:hi\n"),
        ([{"role": "User", "content": "hi"}], "user:hi\n"),
        ([USER, YES, USER], "user:hi\nassistant:yes\nuser:hi\n"),
        ([YES, USER], "assistant:yes\nuser:hi\n"),
        ([USER, {"role": "assistant", "content": None}], "user:hi\n"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"text": "c"}]}],
            "user:a\nb\nc\n",
        ),
        ([USER | {"tool_calls": [], "name": None, "annotations": [], "weight": 1}], "user:hi\n"),
        ([USER | {"name": ""}], "user:hi\n"),
    ],
)
def test_what_is_obeyed(dialect, messages, prompt, words):
    assert told(dialect(words(messages))) == prompt


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, YES | {"tool_calls": [{"id": "c"}]}, USER], "has `tool_calls`, which is not"),
        ([USER, YES | {"content": None, "tool_calls": [{}]}], "has `tool_calls`, which is not"),
        ([USER, YES | {"function_call": {}, "refusal": "no"}, USER], "has `refusal`, which is"),
        ([USER, {"role": "tool", "content": "1", "tool_call_id": "c"}], "the role 'tool'"),
        ([USER, {"role": "observation", "content": "1"}], "the role 'observation'"),
        (
            [{"role": "system", "content": "S", "tools": [{"name": "f"}]}, USER],
            "has `tools`, which",
        ),
        ([USER | {"functions": '[{"name": "f"}]'}], "has `functions`, which is not"),
        ([USER | {"name": "anna"}], "a message has a `name`, which the chat template has no"),
        ([USER | {"name": 5}], "has `name` that is a number, which is not supported"),
        ([USER, YES | {"content": None}, USER], "that is null, expected a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part that is image_url"),
        ([{"role": "user", "content": [{"text": "a", "image": "x"}]}], "a part that is None"),
        ([{"role": "system", "content": "S"}], "has no user message; there is nothing to answer"),
        ([USER, YES, {"role": "user", "content": ""}], "is empty; there is nothing to answer"),
        ([USER | {"prefix": True}, YES, USER], "has `prefix` before its last message"),
    ],
)
def test_what_is_refused(dialect, messages, reason, words):
    said = complaint(dialect(words(messages)))
    assert reason in said.replace("is from", "the role")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_assistant_turn_at_the_end_is_the_options_to_decide(dialect, words):
    record = dialect(words([USER, YES]))
    assert "ends with an assistant turn; choose with --last-assistant" in complaint(record)
    assert told(record, last_assistant="drop") == "user:hi\n"
    assert told(record, last_assistant="continue") == "user:hi\nassistant:yes\n"
    blank = dialect(words([USER, YES | {"content": " "}]))
    assert "is blank" in complaint(blank, last_assistant="continue")
    only = dialect(words([YES]))
    assert "has no user message" in complaint(only, last_assistant="drop")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_message_that_is_marked_as_begun_is_gone_on_with(dialect, words):
    record = dialect(words([USER, YES | {"prefix": True}]))
    assert told(record) == "user:hi\nassistant:yes\n"


def test_a_name_that_the_template_writes_is_obeyed_and_one_that_is_ignored_is_told():
    record = in_messages([USER | {"name": "anna"}])
    assert told(record, render=named_render) == "user(anna):hi\n"
    request = ask(record, ignore_fields=("name",))
    assert request.item.notes == ("ignored `name`",)


def test_reasoning_of_a_history_is_handed_to_the_template():
    seen = []

    def render(messages):
        seen.extend(messages)
        return [1]

    for name in ("reasoning_content", "reasoning"):
        ask(in_messages([USER, YES | {name: "hm"}, USER]), render=render)
        assert seen[1] == YES | {"reasoning_content": "hm"}
        seen.clear()


@pytest.mark.parametrize(
    "tools",
    [[{"name": "add"}], '[{"name": "add"}]', {"name": "add"}, '{"name": "add"}'],
)
@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize("record", [in_messages([USER]), {"prompt": "hi"}, {"turns": ["hi"]}])
def test_tools_beside_a_conversation_are_refused(record, name, tools):
    record = record | {name: tools}
    assert f"`{name}` defines tools, which are not supported" in complaint(record)
    assert ask(record, ignore_fields=(name,)).item.notes == (f"ignored `{name}`",)
    assert told(record, template="x") == "user:x\n"  # a template says itself what it writes


@pytest.mark.parametrize(
    "tools", [None, [], "[]", {}, "{}", {"a": None}, "", "hammer", ["hammer"], 5]
)
def test_a_column_that_only_has_the_name_of_tools_is_a_column(tools):
    assert told({"prompt": "hi", "tools": tools}) == "user:hi\n"


@pytest.mark.parametrize("nothing", ["", None])
def test_a_column_that_is_empty_is_none_of_two_prompts(nothing):
    assert told({"prompt": nothing, "messages": json.dumps([USER])}) == "user:hi\n"
    assert told({"prompt": "hi", "messages": nothing}) == "user:hi\n"
    assert "both" in complaint({"prompt": "", "messages": ""})
    assert "both" in complaint({"prompt": "hi", "messages": []})  # no file of text says so


@pytest.mark.parametrize("nothing", ["", " ", "null", "{}"])
def test_settings_in_an_empty_cell_are_none(nothing):
    record = {"prompt": "hi", "sampling_params": nothing, "chat_template_kwargs": nothing}
    assert told(record) == "user:hi\n"


def test_tool_calls_that_are_json_text_of_nothing_are_none():
    assert told(in_messages([USER | {"tool_calls": "[]"}])) == "user:hi\n"
    assert "has `tool_calls`" in complaint(in_messages([USER | {"tool_calls": '[{"id": "a"}]'}]))


def test_a_prompt_that_is_named_as_messages_is_read_as_messages():
    text = json.dumps([USER])
    assert told({"prompt": text}) == f"user:{text}\n"
    assert told({"prompt": text}, messages_column="prompt") == "user:hi\n"
    reason = "`prompt` is a string, expected a list of messages."
    assert complaint({"prompt": "hi"}, messages_column="prompt").startswith(reason)


def test_two_prompts_are_refused_until_an_option_names_one():
    record = {"prompt": "a", "messages": [USER]}
    both = "both `prompt` and `messages` are given; choose with --prompt-column prompt or"
    assert complaint(record).startswith(both)
    assert told(record, prompt_column="prompt") == "user:a\n"
    assert told(record, messages_column="messages") == "user:hi\n"
    assert complaint(record, prompt_column="prompt", messages_column="messages")
    other = {"prompt": "a", "conversations": [USER]}
    assert "--messages-column conversations" in complaint(other)
    assert told(other, messages_column="conversations") == "user:hi\n"
    request = {"prompt": "a"} | in_body([USER])
    assert told(request, messages_column="body") == "user:hi\n"
    turns = {"prompt": "a", "turns": ["b"]}
    assert told(turns, messages_column="turns") == "user:b\n"


def test_a_column_that_is_a_prompt_goes_before_one_that_only_has_its_name():
    assert told({"body": {"x": 1}, "conversations": [USER], "turns": [5]}) == "user:hi\n"
    assert told({"x": "hi"}, prompt_column="x", messages_column="x") == "user:hi\n"
    assert told({"x": [USER]}, prompt_column="x", messages_column="x") == "user:hi\n"
    assert "choose with" in complaint({"conversations": [USER], "turns": ["a"]})


def test_a_column_that_an_option_names_is_asked_or_nothing_is():
    record = {"question": None, "messages": [USER]}
    said = complaint(record, prompt_column="question")
    assert said == "`question` is null, expected a string."


def test_a_systems_column_is_the_records_own_prompt():
    record = {"prompt": "hi", "system": "S"}
    assert told(record, system_column="system") == "system:S\nuser:hi\n"
    assert told(record, system_column="system", system_prompt="J") == "system:S\nuser:hi\n"
    for absent in (None, ""):
        record = {"prompt": "hi", "system": absent}
        assert told(record, system_column="system", system_prompt="J") == "system:J\nuser:hi\n"
    assert "`system` is a number" in complaint(
        {"prompt": "hi", "system": 5}, system_column="system"
    )
    own = {"messages": [{"role": "system", "content": "T"}, USER], "system": "S"}
    assert "have different system prompts" in complaint(own, system_column="system")
    assert told(own | {"system": "T"}, system_column="system") == "system:T\nuser:hi\n"


def test_a_table_that_mixes_both_words_has_nulls_in_the_others():
    openai, sharegpt = USER | {"from": None, "value": None}, {"role": None, "content": None}
    sharegpt |= {"from": "human", "value": "yo"}
    assert told({"messages": [openai, YES, sharegpt]}) == "user:hi\nassistant:yes\nuser:yo\n"


@pytest.mark.parametrize("name", ["conversations", "conversation"])
def test_json_text_is_read_as_what_it_is(name):
    assert told({name: json.dumps([USER])}) == "user:hi\n"
    assert told({"turns": '["a"]'}) == "user:a\n"
    assert told({"body": json.dumps(in_body([USER])["body"])}) == "user:hi\n"
    assert told({"prompt": '[{"role": "user"}]'}) == 'user:[{"role": "user"}]\n'  # text is text


@pytest.mark.parametrize(
    "url",
    [
        *("/v1/chat/completions", "/v1/chat/completions/", "/chat/completions", None),
        *("/v4/chat/completions", "https://h.example/v1/chat/completions?api-version=2"),
        "/openai/deployments/d/chat/completions",
    ],
)
def test_urls_of_other_services_are_chats(url):
    assert told(in_body([USER]) | {"url": url, "method": "post"}) == "user:hi\n"


def test_a_body_without_a_url_tells_what_it_is():
    assert told({"body": {"prompt": "hi"}}) == "hi"
    assert told({"url": "/openai/completions", "body": {"prompt": "hi"}}) == "hi"
    for url in ("/v1/responses", "/v1/embeddings", 5):
        assert complaint({"url": url, "body": {"prompt": "hi"}}).startswith("`url` is")


def test_a_body_can_go_on_with_its_last_message():
    def body(**more):
        record = in_body([USER, YES])
        return record | {"body": record["body"] | more}

    how = {"continue_final_message": True, "add_generation_prompt": False}
    assert told(body(**how)) == "user:hi\nassistant:yes\n"
    assert told(body(continue_final_message=True)) == "user:hi\nassistant:yes\n"
    for wrong in (
        {"continue_final_message": True, "add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"continue_final_message": "yes"},
    ):
        assert "contradict each other" in complaint(body(**wrong))
    ended = in_body([USER])
    ended["body"] |= {"continue_final_message": True}
    assert "has no assistant message to go on with" in complaint(ended)


@pytest.mark.parametrize("place", ["body", "record"])
def test_a_record_chooses_whether_the_model_thinks(place):
    def thinks(kwargs):
        record = in_body([USER]) if place == "body" else in_messages([USER])
        (record["body"] if place == "body" else record)["chat_template_kwargs"] = kwargs
        return record

    def render(messages, thinking=None):
        return fake_render(f"{thinking}")

    for value in (True, False):
        assert told(thinks({"enable_thinking": value}), render=render) == f"{value}"
    assert told(thinks({"enable_thinking": None}), render=render) == "None"
    assert "`enable_thinking` is" not in complaint(thinks({"enable_thinking": 1}))
    assert "chat_template_kwargs.style` is 'x'" in complaint(thinks({"style": "x"}))


def test_a_text_that_goes_on_has_no_reasoning_and_a_record_that_thinks_is_split_so():
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", last_assistant="continue")

    def split(text, thinking=None):
        return Said(f"{thinking}", text)

    assert said_in("x", in_messages([USER]), spec, split) == ("None", "x")
    assert said_in("x", in_messages([USER, YES]), spec, split) == (None, "x")
    assert said_in("x", {"body": {"prompt": "p"}}, spec, split) == (None, "x")
    record = in_messages([USER]) | {"chat_template_kwargs": {"enable_thinking": True}}
    assert said_in("x", record, spec, split) == ("True", "x")


def test_what_is_ignored_is_counted_in_rows_report_and_manifest(tmp_path):
    records = [
        in_messages([USER]) | {"tools": [{"name": "a"}]},
        in_body([USER]),
        {"body": {"messages": [USER], "tools": [{}], "reasoning_effort": "low"}},
        {"body": {"messages": [USER], "reasoning_effort": None}},
    ]
    write_lines(tmp_path / "in.jsonl", *records)
    ignored = {"tools": 2, "reasoning_effort": 1}
    report = start(tmp_path, ignore_fields=("tools", "reasoning_effort"))
    page = write_report(f"{tmp_path}/out.jsonl").read_text()
    assert "ignored `reasoning_effort`" in page
    assert report.input_notes == {f"ignored `{name}`": n for name, n in ignored.items()}
    manifest = json.loads((tmp_path / "out.jsonl.run/manifest.json").read_text())
    assert manifest["ignored"] == ignored
    notes = [row["input_notes"] for row in rows_in(tmp_path / "out.jsonl")]
    assert notes == [
        ["ignored `tools`"],
        None,
        ["ignored `tools`", "ignored `reasoning_effort`"],
        None,
    ]


def test_a_record_that_cannot_be_asked_ignores_nothing():
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", ignore_fields=("tools",))
    assert ignored_in({"prompt": 5, "tools": [{}]}, spec) == ()
    assert num_turns({"turns": [5]}, spec) == 1


def test_json_text_of_messages_with_a_key_twice_is_refused():
    record = {"messages": '[{"role":"user","content":"a","content":"b"}]'}
    with pytest.raises(Unusable, match=r"`messages`: the key `content` stands twice in one object"):
        question_of(record, Spec(inputs=("in.jsonl",), out="o.jsonl"))
