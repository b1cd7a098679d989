"""Small Python functions from a fixed description."""

from dataclasses import dataclass
from random import Random

from recipes.tiny.tasks.task import MakeTask, Task, ask, words

VERBS = words("get find compute make build check load read pick take")
NOUNS = words(
    "values items scores numbers prices points sizes marks orders results weights counts ages "
    "grades totals"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One operation on a list `{arg}`; `{k}` is a small constant where it occurs."""

    does: str  # "returns ..."
    body: str
    example: str  # value of the example list, as Python
    result: str  # what the example call prints


RECIPES = (
    Recipe("returns the sum of the {arg}", "    total = 0\n    for each in {arg}:\n"
           "        total += each\n    return total", "[1, 2, 3]", "6"),
    Recipe("returns the largest of the {arg}", "    best = {arg}[0]\n    for each in {arg}:\n"
           "        if each > best:\n            best = each\n    return best", "[4, 9, 2]", "9"),
    Recipe("returns the smallest of the {arg}", "    best = {arg}[0]\n    for each in {arg}:\n"
           "        if each < best:\n            best = each\n    return best", "[4, 9, 2]", "2"),
    Recipe("returns the mean of the {arg}", "    return sum({arg}) / len({arg})",
           "[2, 4, 6]", "4.0"),
    Recipe("returns the {arg} in reverse order", "    return list(reversed({arg}))",
           "[1, 2, 3]", "[3, 2, 1]"),
    Recipe("returns how many of the {arg} are greater than {k}", "    count = 0\n"
           "    for each in {arg}:\n        if each > {k}:\n            count += 1\n"
           "    return count", "[]", "0"),
    Recipe("returns the {arg} that are greater than {k}",
           "    return [each for each in {arg} if each > {k}]", "[]", "[]"),
    Recipe("returns the {arg} that are less than {k}",
           "    return [each for each in {arg} if each < {k}]", "[]", "[]"),
    Recipe("returns the {arg} multiplied by {k}",
           "    return [each * {k} for each in {arg}]", "[0]", "[0]"),
    Recipe("returns the {arg} with {k} added to each",
           "    return [each + {k} for each in {arg}]", "[0]", "[{k}]"),
    Recipe("returns the first {k} of the {arg}", "    return {arg}[:{k}]", "[7]", "[7]"),
    Recipe("returns the last {k} of the {arg}", "    return {arg}[-{k}:]", "[7]", "[7]"),
    Recipe("returns the {arg} without duplicates, in order", "    seen = []\n"
           "    for each in {arg}:\n        if each not in seen:\n"
           "            seen.append(each)\n    return seen", "[3, 3, 5]", "[3, 5]"),
    Recipe("returns the even ones of the {arg}",
           "    return [each for each in {arg} if each % 2 == 0]", "[1, 2, 4]", "[2, 4]"),
    Recipe("returns the odd ones of the {arg}",
           "    return [each for each in {arg} if each % 2 == 1]", "[1, 2, 5]", "[1, 5]"),
    Recipe("returns the squares of the {arg}", "    return [each * each for each in {arg}]",
           "[1, 2, 3]", "[1, 4, 9]"),
    Recipe("returns the running total of the {arg}", "    total = 0\n    totals_so_far = []\n"
           "    for each in {arg}:\n        total += each\n"
           "        totals_so_far.append(total)\n    return totals_so_far",
           "[1, 2, 3]", "[1, 3, 6]"),
    Recipe("returns whether the {arg} contain {k}", "    return {k} in {arg}", "[{k}]", "True"),
    Recipe("returns the index of {k} in the {arg}, or -1 if it is missing",
           "    for index, each in enumerate({arg}):\n        if each == {k}:\n"
           "            return index\n    return -1", "[{k}]", "0"),
    Recipe("returns the product of the {arg}", "    product = 1\n    for each in {arg}:\n"
           "        product *= each\n    return product", "[2, 3, 4]", "24"),
)  # fmt: skip


def python_function(rng: Random) -> Task:
    """Write a named function with a docstring and an example."""
    recipe, arg, k = rng.choice(RECIPES), rng.choice(NOUNS), rng.randrange(2, 30)
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    does, body, example, result = (
        text.format(arg=arg, k=k)
        for text in (recipe.does, recipe.body, recipe.example, recipe.result)
    )
    says = does.removeprefix("returns ")
    answer = (
        f"Here is the function `{name}`:\n\n```python\ndef {name}({arg}):\n"
        f'    """Return {says}."""\n{body}\n\n\nprint({name}({example}))  # {result}\n```'
    )
    prompt = ask(
        rng,
        f"Write a Python function `{name}` that takes a list `{arg}` and {does}.",
        f"Write a function called {name} in Python. It takes a list named {arg} and {does}.",
    )
    return Task(prompt, answer, f"{name} {arg} {does}")


CODE_KINDS: dict[str, MakeTask] = {"python_function": python_function}
