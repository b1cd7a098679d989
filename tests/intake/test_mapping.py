import pytest
from fakes import fake_render
from jinja2 import TemplateError, UndefinedError

from dspark_batch.intake.mapping import to_request
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item

CHAT = [{"role": "user", "content": "hi"}]


def ask(record, context_length=100, render=fake_render, **options):
    spec = Spec(inputs=("in.jsonl",), out="o.jsonl", **options)
    return to_request(Item(0, "0", "d", "in.jsonl:1", record), spec, render, context_length)


def rendered(record, **options):
    return "".join(map(chr, ask(record, **options).prompt_ids))


def complaint(record, **options):
    failure = ask(record, **options)
    assert failure.code == "bad_record"
    return failure.message.removeprefix("in.jsonl:1: ")


def test_a_prompt_is_one_user_message():
    assert rendered({"prompt": "hi"}) == "user:hi\n"


def test_messages_are_taken_as_they_are():
    chat = [*CHAT, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "?"}]
    assert rendered({"messages": chat}) == "user:hi\nassistant:yo\nuser:?\n"


def test_columns_can_have_other_names():
    record = {"q": "hi", "prompt": "no", "messages": "no"}
    assert rendered(record, prompt_column="q", messages_column="c") == "user:hi\n"
    assert rendered({"c": CHAT}, messages_column="c") == "user:hi\n"


def test_a_null_column_is_absent():
    assert rendered({"prompt": None, "messages": CHAT}) == "user:hi\n"
    assert rendered({"prompt": "hi", "messages": None}) == "user:hi\n"


def test_the_system_prompt_comes_first_unless_the_item_has_one():
    assert rendered({"prompt": "hi"}, system_prompt="Be brief.") == "system:Be brief.\nuser:hi\n"
    own = [{"role": "system", "content": "Mine."}, *CHAT]
    assert rendered({"messages": own}, system_prompt="Be brief.") == "system:Mine.\nuser:hi\n"


def test_blanks_in_a_prompt_are_kept():
    assert rendered({"prompt": " \n"}) == "user: \n\n"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            {"text": "x", "n": 1},
            "no `prompt` or `messages`; columns are `text`, `n`; name the right one with "
            "--prompt-column or --messages-column.",
        ),
        (
            {},
            "no `prompt` or `messages`; columns are none; name the right one with --prompt-column "
            "or --messages-column.",
        ),
        ({"prompt": None}, "`prompt` is null, expected a string."),
        ({"prompt": 5}, "`prompt` is a number, expected a string."),
        ({"prompt": ["a"]}, "`prompt` is a list, expected a string."),
        ({"prompt": ""}, "`prompt` is empty; there is nothing to answer."),
        (
            {"prompt": "a", "messages": CHAT},
            "both `prompt` and `messages` are given; choose with --prompt-column prompt or "
            "--messages-column messages.",
        ),
        ({"messages": []}, "`messages` is empty, expected a list of messages."),
        ({"messages": "hi"}, "`messages` is a string, expected a list of messages."),
        (
            {"messages": ["hi"]},
            "`messages[0]` is a string, expected an object with role and content.",
        ),
        (
            {"messages": [*CHAT, {"content": "a"}]},
            "`messages[1]` has no role, expected one of system, user, assistant.",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "`messages[0]` has a content that is null, expected a string.",
        ),
        (
            {"messages": [{"role": ["x"], "content": "a"}]},
            "`messages[0]` has the role ['x'], expected one of system, user, assistant.",
        ),
    ],
)
def test_says_what_is_wrong_with_a_record(record, sentence):
    assert complaint(record) == sentence


@pytest.mark.parametrize("kind", [TemplateError, UndefinedError, TypeError, ValueError, KeyError])
def test_a_template_that_refuses_a_conversation_fails_the_item_only(kind):
    def render(messages):
        raise kind("roles must alternate")

    said = complaint({"messages": CHAT}, render=render)
    assert said.startswith("the chat template refuses this conversation (")
    assert "roles must alternate" in said


def test_a_template_that_renders_nothing_fails_the_item_only():
    assert complaint({"prompt": "a"}, render=lambda m: []) == "the prompt renders to no tokens."


def test_max_tokens_is_cut_to_the_room_in_the_context():
    length = len("user:hi\n")
    assert ask({"prompt": "hi"}, max_tokens=5, context_length=length + 9).max_tokens == 5
    assert ask({"prompt": "hi"}, max_tokens=5, context_length=length + 5).max_tokens == 5
    assert ask({"prompt": "hi"}, max_tokens=5, context_length=length + 4).max_tokens == 4
    assert ask({"prompt": "hi"}, max_tokens=5, context_length=length + 1).max_tokens == 1


@pytest.mark.parametrize(("context_length", "too_many"), [(8, 1), (5, 4)])
def test_a_prompt_that_leaves_no_room_is_a_failure(context_length, too_many):
    failure = ask({"prompt": "hi"}, context_length=context_length)
    assert failure.code == "prompt_too_long"
    assert failure.message == (
        f"in.jsonl:1: 8 prompt tokens leave no room in a context of {context_length}; shorten the "
        f"prompt by {too_many} tokens or more."
    )


def test_sharegpt_words_are_messages():
    said = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yo"},
        {"from": "human", "value": "?"},
    ]
    told = "system:Be brief.\nuser:hi\nassistant:yo\nuser:?\n"
    assert rendered({"conversations": said}) == told
    assert rendered({"chat": said}, messages_column="chat") == told


def test_a_last_answer_in_sharegpt_words_makes_place_for_ours():
    said = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "old"}]
    assert rendered({"conversations": said}, last_assistant="drop") == "user:hi\n"


def test_a_turn_is_a_user_message():
    assert rendered({"turns": ["hi"]}, system_prompt="Hm.") == "system:Hm.\nuser:hi\n"


def test_a_prompt_is_preferred_to_columns_that_only_look_like_one():
    record = {"prompt": "hi", "body": {"x": 1}, "conversations": [1], "turns": [2]}
    assert rendered(record) == "user:hi\n"


def test_a_column_of_another_type_is_no_known_shape():
    assert complaint({"turns": 3, "body": "text", "conversations": "a"}).startswith("no `prompt`")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"turns": []}, "`turns` is empty, expected a list of user texts."),
        ({"turns": ["a", 1]}, "`turns[1]` is a number, expected a string."),
        ({"turns": [""]}, "`turns[0]` is empty; there is nothing to answer."),
        (
            {"conversations": [{"from": "wizard", "value": "x"}]},
            "`conversations[0]` is from 'wizard', expected one of system, user, assistant, "
            "developer, human, prompter, gpt, chatgpt, model, bot, ai, bing, bard, claude.",
        ),
        (
            {"conversations": [{"from": "human"}]},
            "`conversations[0]` has a value that is null, expected a string.",
        ),
        ({"conversations": []}, "`conversations` is empty, expected a list of messages."),
    ],
)
def test_says_what_is_wrong_with_a_shape(record, sentence):
    assert complaint(record) == sentence


def test_a_template_makes_the_prompt_of_the_columns():
    record = {"q": "hi", "prompt": "no", "messages": "no", "my tag": "T"}
    told = rendered(record, template='{{ row["my tag"] }}: {{ q|upper }}', system_prompt="S")
    assert told == "system:S\nuser:T: HI\n"


def test_a_template_can_walk_over_lists():
    record = {"texts": ["a", "b"]}
    template = "{% for t in texts %}{{ loop.index }}.{{ t }} {% endfor %}"
    assert rendered(record, template=template) == "user:1.a 2.b \n"


def test_a_template_escapes_nothing():
    assert rendered({"q": "<&>"}, template="{{ q }}") == "user:<&>\n"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            "{{ w }}",
            "the template asks for what this record lacks ('w' is undefined); columns are `q`, "
            "`n`.",
        ),
        ("{{ n }}", "the template writes out a null; test the column with {% if %}."),
        ("{% if n %}x{% endif %} ", "the template renders to blanks; there is nothing to answer."),
        ("{{ q / 2 }}", "the template does not fit this record (unsupported operand"),
        ("{{ 1 / 0 }}", "the template does not fit this record (division by zero)."),
        ("{{ q.__class__.mro() }}", "the template does not fit this record (access to"),
        ("{{ q.w }}", "the template asks for what this record lacks ('str object' has no"),
    ],
)
def test_a_template_that_does_not_fit_fails_the_item_only(template, sentence):
    assert complaint({"q": "hi", "n": None}, template=template).startswith(sentence)


def test_a_template_changes_no_record():
    record = {"texts": ["a"]}
    template = "{% set _ = texts.append('b') %}{{ texts|join }}"
    assert "is unsafe" in complaint(record, template=template)
    assert record == {"texts": ["a"]}


LONG = {"prompt": "0123456789"}  # 16 tokens with its role
ROOM = {"context_length": 16, "max_tokens": 4}


def test_a_prompt_that_leaves_no_room_can_be_skipped():
    failure = ask(LONG, **ROOM, on_overflow="skip")
    assert (failure.code, failure.is_skipped) == ("prompt_too_long", True)
    assert not ask(LONG, **ROOM).is_skipped


@pytest.mark.parametrize(("side", "told"), [("left", "user:456789\n"), ("right", "user:012345\n")])
def test_a_prompt_can_be_cut_to_leave_room_for_the_answer(side, told):
    request = ask(LONG, **ROOM, on_overflow=f"truncate-{side}")
    assert "".join(map(chr, request.prompt_ids)) == told
    assert request.max_tokens == 4


def test_a_prompt_with_room_for_one_token_is_not_cut():
    request = ask(LONG, context_length=17, max_tokens=4, on_overflow="truncate-left")
    assert (len(request.prompt_ids), request.max_tokens) == (16, 1)


def test_only_the_last_question_is_cut():
    chat = [*CHAT, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "abcdef"}]
    request = ask({"messages": chat}, context_length=32, max_tokens=2, on_overflow="truncate-right")
    assert "".join(map(chr, request.prompt_ids)) == "user:hi\nassistant:yo\nuser:abc\n"


@pytest.mark.parametrize("context_length", [10, 4])
def test_what_no_cut_makes_fit_is_a_failure(context_length):
    failure = ask(LONG, context_length=context_length, max_tokens=4, on_overflow="truncate-left")
    assert failure.code == "prompt_too_long"
    assert not failure.is_skipped
    assert "no cut of its last question makes room for max_tokens" in failure.message
