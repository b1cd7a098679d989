"""Arithmetic written out step by step, and work with short lists of numbers."""

from random import Random

from recipes.tiny.tasks.task import MakeTask, Task, ask, words

PLACES = ("Ones", "Tens", "Hundreds", "Thousands")
ONES = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = words("- - twenty thirty forty fifty sixty seventy eighty ninety")
GOODS = words("pens books cups lamps apples bags hats plates keys chairs tickets stamps")
BUYERS = words("Mia Noah Lena Omar Ivy Hugo Sara Ben Nina Paul Zoe Karl")


def _digits(value: int, width: int) -> list[int]:
    """Split a number into its digits, ones first, padded with zeros to `width`."""
    return [value // 10**place % 10 for place in range(width)]


def add(rng: Random) -> Task:
    """Add two numbers of up to four digits, column by column."""
    width = rng.choice((2, 3, 3, 4))
    a, b = rng.randrange(10 ** (width - 1), 10**width), rng.randrange(10, 10**width)
    lines, carry = [f"Add {a} and {b} digit by digit."], 0
    pairs = zip(PLACES, _digits(a, width), _digits(b, width), strict=False)
    for place, x, y in pairs:
        total = x + y + carry
        lines.append(
            f"{place}: {x} + {y} + {carry} = {total}. Write {total % 10}, carry {total // 10}."
        )
        carry = total // 10
    lines.append(f"Result: {a + b}")
    prompt = ask(
        rng,
        f"What is {a} + {b}? Work it out step by step.",
        f"Add {a} and {b}. Show the steps.",
        f"Calculate {a} + {b} step by step.",
        f"Compute the sum of {a} and {b}.",
    )
    return Task(prompt, "\n".join(lines), f"{min(a, b)}+{max(a, b)}")


def subtract(rng: Random) -> Task:
    """Subtract, column by column, with borrowing."""
    width = rng.choice((2, 3, 3, 4))
    b, a = sorted(rng.sample(range(10 ** (width - 1), 10**width), 2))
    lines, borrow = [f"Subtract {b} from {a} digit by digit."], 0
    pairs = zip(PLACES, _digits(a, width), _digits(b, width), strict=False)
    for place, x, y in pairs:
        low = x - y - borrow < 0
        top = x + 10 if low else x
        digit = top - y - borrow
        lines.append(
            f"{place}: {top} - {y} - {borrow} = {digit}. Write {digit}, borrow {int(low)}."
        )
        borrow = int(low)
    lines.append(f"Result: {a - b}")
    prompt = ask(
        rng,
        f"What is {a} - {b}? Work it out step by step.",
        f"Subtract {b} from {a}. Show the steps.",
        f"Calculate {a} - {b} step by step.",
        f"Compute the difference between {a} and {b}.",
    )
    return Task(prompt, "\n".join(lines), f"{a}-{b}")


def multiply(rng: Random) -> Task:
    """Multiply a number of two to four digits by one digit."""
    width, b = rng.choice((2, 3, 3, 4)), rng.randrange(2, 10)
    a = rng.randrange(10 ** (width - 1), 10**width)
    lines, carry = [f"Multiply {a} by {b} digit by digit."], 0
    for place, x in zip(PLACES, _digits(a, width), strict=False):
        total = x * b + carry
        lines.append(
            f"{place}: {x} x {b} = {x * b}, plus {carry} is {total}. "
            f"Write {total % 10}, carry {total // 10}."
        )
        carry = total // 10
    lines.append(f"Result: {a * b}")
    prompt = ask(
        rng,
        f"What is {a} x {b}? Work it out step by step.",
        f"Multiply {a} by {b}. Show the steps.",
        f"Calculate {a} times {b} step by step.",
    )
    return Task(prompt, "\n".join(lines), f"{a}*{b}")


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def sort(rng: Random) -> Task:
    """Sort three to eight two-digit numbers by picking the next one again and again."""
    numbers = rng.sample(range(10, 100), rng.randrange(3, 9))
    falling = rng.random() < 0.4
    word, order = ("Largest", "descending") if falling else ("Smallest", "ascending")
    left, lines = list(numbers), [f"Numbers: {_join(numbers)}"]
    while left:
        pick = max(left) if falling else min(left)
        left.remove(pick)
        lines.append(f"{word}: {pick}. Left: {_join(left) or 'none'}")
    lines.append(f"Sorted: {_join(sorted(numbers, reverse=falling))}")
    prompt = ask(
        rng,
        f"Sort these numbers in {order} order: {_join(numbers)}",
        f"Put {_join(numbers)} in {order} order, step by step.",
        f"Arrange the numbers {_join(numbers)} in {order} order.",
    )
    return Task(prompt, "\n".join(lines), f"{order} {_join(sorted(numbers))}")


def sequence(rng: Random) -> Task:
    """Continue an arithmetic sequence."""
    start, step, more = rng.randrange(1, 60), rng.randrange(2, 13), rng.randrange(4, 13)
    shown = [start + step * i for i in range(3)]
    lines, term, terms = [f"Each term grows by {step}."], shown[-1], []
    for _ in range(more):
        lines.append(f"{term} + {step} = {term + step}")
        term += step
        terms.append(term)
    lines.append(f"Next terms: {_join(terms)}")
    prompt = ask(
        rng,
        f"Continue the sequence {_join(shown)} with {more} more terms.",
        f"What are the next {more} terms of {_join(shown)}?",
        f"Write the {more} numbers that follow {_join(shown)}.",
    )
    return Task(prompt, "\n".join(lines), f"{start} by {step}")


def keep(rng: Random) -> Task:
    """Keep the even, odd, large or small numbers of a list, one decision a line."""
    numbers = rng.sample(range(10, 100), rng.randrange(4, 9))
    limit = rng.randrange(30, 71)
    word, rule = rng.choice(
        (
            ("even", lambda n: n % 2 == 0),
            ("odd", lambda n: n % 2 == 1),
            (f"greater than {limit}", lambda n: n > limit),
            (f"less than {limit}", lambda n: n < limit),
        )
    )
    lines = [f"{n}: {'yes' if rule(n) else 'no'}" for n in numbers]
    kept = [n for n in numbers if rule(n)]
    lines.append(f"Kept: {_join(kept) or 'none'}")
    prompt = ask(
        rng,
        f"Which of these numbers are {word}? {_join(numbers)}",
        f"Keep only the numbers that are {word}: {_join(numbers)}",
        f"From {_join(numbers)}, list the numbers that are {word}.",
    )
    return Task(prompt, "\n".join(lines), f"{word} of {_join(numbers)}")


def in_words(value: int) -> str:
    """Write a number from 0 to 9999 in English words."""
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10] + (f"-{ONES[value % 10]}" if value % 10 else "")
    size, name = (1000, "thousand") if value >= 1000 else (100, "hundred")
    rest = f" {in_words(value % size)}" if value % size else ""
    return f"{ONES[value // size]} {name}{rest}"


def spell_number(rng: Random) -> Task:
    """Write a number in words, place by place."""
    value = rng.randrange(100, 10000)
    digits = _digits(value, len(str(value)))
    lines = [f"{PLACES[place]}: {digits[place]}" for place in reversed(range(len(digits)))]
    lines.append(f"In words: {in_words(value)}")
    prompt = ask(
        rng,
        f"Write {value} in words.",
        f"Spell out the number {value}.",
        f"How do you write {value} as words?",
    )
    return Task(prompt, "\n".join(lines), f"words {value}")


def shopping(rng: Random) -> Task:
    """Add up what somebody pays for two to four kinds of goods."""
    buyer = rng.choice(BUYERS)
    bought = [
        (rng.randrange(2, 10), thing, rng.randrange(2, 10))
        for thing in rng.sample(GOODS, rng.randrange(2, 5))
    ]
    parts = [f"{count} {thing} at {price} euros each" for count, thing, price in bought]
    lines, total = [], 0
    for count, thing, price in bought:
        cost = count * price
        lines.append(f"{thing.capitalize()}: {count} x {price} = {cost} euros.")
        lines.append(f"So far: {total} + {cost} = {total + cost} euros.")
        total += cost
    lines.append(f"{buyer} pays {total} euros.")
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    prompt = ask(
        rng,
        f"{buyer} buys {listed}. How much does {buyer} pay?",
        f"{buyer} buys {listed}. What is the total price?",
        f"How much does {buyer} pay for {listed}?",
    )
    return Task(prompt, "\n".join(lines), f"shop {listed}")


NUMBER_KINDS: dict[str, MakeTask] = {
    "add": add,
    "subtract": subtract,
    "multiply": multiply,
    "sort": sort,
    "sequence": sequence,
    "keep": keep,
    "spell_number": spell_number,
    "shopping": shopping,
}
