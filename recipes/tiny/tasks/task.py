from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction with its answer."""

    prompt: str
    answer: str  # for a task with free wording, one of many good answers
    content: str  # what is asked, without the wording: the split into sides hashes this
    exact: bool = True  # the prompt and the corpus's conventions leave one right answer


MakeTask = Callable[[Random], Task]


def ask(rng: Random, *wordings: str) -> str:
    """Choose one wording and, sometimes, a polite beginning or end."""
    text = rng.choice(wordings)
    manners = rng.random()
    if manners < 0.08:
        return f"Please help me. {text}"
    return f"{text} Thank you!" if manners > 0.94 else text


def words(text: str) -> list[str]:
    """Split a line of words."""
    return text.split()
