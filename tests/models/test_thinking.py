"""A template with a switch for thinking, and answers that begin with it."""

import json
from importlib.resources import files

import pytest

from dspark_batch.errors import UsageError
from dspark_batch.models.thinking import Thinking, default_thinking
from dspark_batch.models.tokenizer import read_tokenizer

ASKED = [{"role": "user", "content": "hi"}]
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# As Qwen3 has it: thinks unless it is told not to.
SWITCH = PLAIN + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}"
)
# As Gemma 4 has it: thinks only if it is told to.
ASKED_FOR = "{% if enable_thinking is defined and enable_thinking %}!{% endif %}" + PLAIN
ALWAYS = PLAIN + "<think>\n"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture
def tokenizer_with(tmp_path):
    """Give the bundled tokenizer tokens for thinking, and another chat template."""

    def make(template, marks=("<think>", "</think>")):
        bundled = files("dspark_batch.tiny") / "target"
        words = json.loads((bundled / "tokenizer.json").read_text())
        settings = json.loads((bundled / "tokenizer_config.json").read_text())
        first = max(words["model"]["vocab"].values()) + 100
        for i, mark in enumerate(marks):
            flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
            words["added_tokens"].append(
                {"id": first + i, "content": mark, "special": False, **flags}
            )
        (tmp_path / "tokenizer.json").write_text(json.dumps(words))
        settings["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return read_tokenizer(tmp_path, None)

    return make


def prompt(tokenizer, asked=None, default=None):
    return tokenizer.decode(Thinking(tokenizer, asked, default).render(ASKED))


def test_the_choice_reaches_the_template(tokenizer_with):
    tokenizer = tokenizer_with(SWITCH)
    assert not prompt(tokenizer, "on").endswith(EMPTY)
    assert prompt(tokenizer, "off").endswith(EMPTY)


@pytest.mark.parametrize(("template", "like"), [(SWITCH, "on"), (ASKED_FOR, "off")])
def test_without_a_choice_the_template_does_what_it_does_by_itself(tokenizer_with, template, like):
    tokenizer = tokenizer_with(template)
    assert prompt(tokenizer) == prompt(tokenizer, like)
    assert prompt(tokenizer, "on") != prompt(tokenizer, "off")


def test_a_choice_goes_before_the_default_of_a_family(tokenizer_with):
    tokenizer = tokenizer_with(SWITCH)
    assert prompt(tokenizer, None, "off") == prompt(tokenizer, "off")
    assert prompt(tokenizer, "on", "off") == prompt(tokenizer, "on")


@pytest.mark.parametrize(
    ("template", "marks", "asked", "says"),
    [
        (PLAIN, (), "on", "has no thinking"),
        (PLAIN, ("<think>", "</think>"), "on", "has no thinking"),
        (ALWAYS, ("<think>", "</think>"), "off", "always begins with thinking"),
    ],
)
def test_what_the_template_cannot_do_is_refused(tokenizer_with, template, marks, asked, says):
    with pytest.raises(UsageError, match=says):
        Thinking(tokenizer_with(template, marks), asked, None)


@pytest.mark.parametrize(
    ("template", "marks", "asked"),
    [
        (PLAIN, (), "off"),
        (PLAIN, ("<think>", "</think>"), "off"),
        (ALWAYS, ("<think>", "</think>"), "on"),
    ],
)
def test_what_the_template_does_anyway_may_be_asked_for(tokenizer_with, template, marks, asked):
    tokenizer = tokenizer_with(template, marks)
    assert prompt(tokenizer, asked) == prompt(tokenizer)


@pytest.mark.parametrize(
    ("template", "text", "said"),
    [
        (SWITCH, "<think>\nHm.\n</think>\n\nYes.\n", ("Hm.", "Yes.\n")),
        (SWITCH, "\n<think>Hm.</think>Yes.", ("Hm.", "Yes.")),
        (SWITCH, "<think>\nHm. And so o", ("Hm. And so o", "")),  # the limit cut it
        (SWITCH, "Yes.", (None, "Yes.")),
        (
            SWITCH,
            "Yes. <think> is a tag, </think> too",
            (None, "Yes. <think> is a tag, </think> too"),
        ),
        (SWITCH, " Yes.\n", (None, " Yes.\n")),
        (SWITCH, "<think>a</think>b</think>c", ("a", "b</think>c")),
        (ALWAYS, "Hm.\n</think>\n\nYes.", ("Hm.", "Yes.")),  # the prompt has opened it
        (ALWAYS, "Hm. And so o", ("Hm. And so o", "")),
        (ALWAYS, "", ("", "")),
    ],
)
def test_the_thinking_is_told_from_the_answer(tokenizer_with, template, text, said):
    assert Thinking(tokenizer_with(template), None, None).split(text) == said


def test_a_template_that_refuses_a_question_is_left_to_the_items(tokenizer_with):
    refuses = "{{ raise_exception('no') if messages | length == 1 }}" + SWITCH
    assert Thinking(tokenizer_with(refuses), None, None).split("Yes.") == (None, "Yes.")


def test_a_model_without_marks_says_only_answers(tokenizer_with):
    said = Thinking(tokenizer_with(PLAIN, ()), None, None).split("<think>a</think>b")
    assert said == (None, "<think>a</think>b")


def test_tokens_of_thinking_decode_to_the_marks_that_split(tokenizer_with):
    tokenizer = tokenizer_with(SWITCH)
    ids = tokenizer.render("<think>\nHm.\n</think>\n\nYes.")
    assert Thinking(tokenizer, None, None).split(tokenizer.decode(ids)) == ("Hm.", "Yes.")


def test_a_family_thinks_as_its_drafter_was_trained():
    assert default_thinking("qwen3", None) == "off"
    assert default_thinking("qwen3", "some/finetune") == "off"
    assert default_thinking(None, None) == "off"
    assert default_thinking(None, "some/target") is None
    assert default_thinking(None, "Qwen/Qwen3-4B") == "off"
    assert default_thinking(None, "mlx-community/Qwen3.5-4B-4bit") == "on"
    assert default_thinking(None, "some/target", "z-lab/Qwen3.5-4B-DFlash") == "on"
    assert default_thinking(None, "some/target", "some/drafter") is None
