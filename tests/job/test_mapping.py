import pytest
from fakes import fake_render
from jinja2 import TemplateError, UndefinedError

from dspark_batch.job.mapping import to_request
from dspark_batch.job.spec import Spec
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
            "both `prompt` and `messages` are given; keep one of them.",
        ),
        ({"messages": []}, "`messages` is empty, expected a list of messages."),
        ({"messages": "hi"}, "`messages` is a string, expected a list of messages."),
        (
            {"messages": ["hi"]},
            "`messages[0]` is a string, expected an object with role and content.",
        ),
        (
            {"messages": [*CHAT, {"content": "a"}]},
            "`messages[1]` has the role None, expected one of system, user, assistant.",
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
