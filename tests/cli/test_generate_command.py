"""One prompt from the shell."""

import re
import sys

import pytest

import dspark_batch
from dspark_batch.cli import generate_command
from dspark_batch.cli.main import main
from dspark_batch.generate import OnePrompt, Piece

WORDS = ["generate", "--prompt", "Write 62 in words.", "--max-tokens", "16"]


def test_prints_the_answer_on_stdout_and_what_it_took_on_stderr(capsys):
    assert main(WORDS) == 0
    said = capsys.readouterr()
    *_, answer = _answers(16)
    assert said.out == answer.text + "\n"
    number = r"\d+\.\d+"
    assert re.fullmatch(rf"16 tokens, accept length {number}, {number} tokens/s\n", said.err)


def test_compare_says_that_the_bytes_are_the_same(capsys):
    assert main([*WORDS, "--compare", "--temperature", "0.8"]) == 0
    _, plain, verdict = capsys.readouterr().err.splitlines()
    assert plain.startswith("without drafts: 16 tokens, accept length 1.00")
    assert verdict == "both answers have the same tokens and the same bytes"


def test_an_answer_that_differs_from_the_plain_one_ends_with_exit_code_3(capsys, monkeypatch):
    *_, answer = _answers(16)
    other = answer._replace(token_ids=(*answer.token_ids[:5], 0), text="other")
    monkeypatch.setattr(OnePrompt, "plainly", lambda self: other)
    assert main([*WORDS, "--compare"]) == 3
    assert "from token 5 on" in capsys.readouterr().err


def test_compare_is_refused_where_an_answer_depends_on_the_drafts(capsys):
    words = ["--compare", "--sampling", "rejection", "--temperature", "1"]
    assert main([*WORDS, *words]) == 2
    assert "rejection" in capsys.readouterr().err


def test_a_prompt_comes_from_a_file_and_a_missing_one_is_refused(capsys, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Write 62 in words.")
    assert main(["generate", "--prompt", f"@{path}", "--max-tokens", "3"]) == 0
    *_, answer = _answers(3)
    assert capsys.readouterr().out == answer.text + "\n"
    assert main(["generate"]) == 2
    assert "--prompt" in capsys.readouterr().err


class Terminal:
    """A standard output that is a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_terminal_gets_colours_and_no_control_characters_of_the_answer(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)

    def pieces():
        yield Piece("a\x1b[2J\n", False)
        yield Piece("b", True)
        return "answer"

    assert generate_command._printed(pieces(), colours=True) == "answer"
    assert terminal.text == "a[2J\n\x1b[32mb\x1b[0m\n"


@pytest.mark.parametrize("words", [[], ["--accepted"]], ids=str)
def test_a_pipe_gets_the_text_alone(capsys, words):
    assert main([*WORDS, *words]) == 0
    assert "\x1b" not in capsys.readouterr().out


def _answers(max_tokens):
    return list(dspark_batch.generate(["Write 62 in words."], max_tokens=max_tokens))
