"""Work on letters, words and lines."""

from random import Random

from recipes.tiny.tasks.task import MakeTask, Task, ask, words

CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"
ENDINGS = ("", "", "n", "r", "l", "s", "t", "m")
WORDS = words(
    "apple bridge candle desert engine forest garden hammer island jacket kettle ladder mirror "
    "needle orange pencil quarry rabbit silver tunnel uncle velvet window yellow zebra anchor "
    "basket copper dragon eagle feather ginger harbour insect jungle kitchen lemon market night "
    "ocean paper quiet river summer tiger umbrella village winter yard zero autumn button castle "
    "dinner evening flower glass honey iron jewel knife letter moon number oven plum queen rain "
    "stone tower under valley water young zone"
)
# First and last character of parts of Unicode; the copy task draws characters from them.
SCRIPTS = (
    (0x00C0, 0x17F),  # Latin with accents
    (0x0391, 0x03C9),  # Greek
    (0x0410, 0x044F),  # Cyrillic
    (0x05D0, 0x05EA),  # Hebrew
    (0x0905, 0x0939),  # Devanagari
    (0x3041, 0x3096),  # Hiragana
    (0x4E00, 0x9FA5),  # Han
    (0xAC00, 0xD7A3),  # Hangul
    (0x1F600, 0x1F64F),  # faces
)


def made_up_word(rng: Random) -> str:
    """Make a word of two or three syllables that can be pronounced."""
    return "".join(
        rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(ENDINGS)
        for _ in range(rng.choice((2, 2, 3)))
    )


def reverse(rng: Random) -> Task:
    """Spell a made-up word backwards."""
    word = made_up_word(rng)
    answer = f"Letters: {' '.join(word)}\nCount: {len(word)}\nReversed: {' '.join(reversed(word))}"
    prompt = ask(
        rng,
        f'Reverse the word "{word}".',
        f'Spell "{word}" backwards.',
        f'Write the letters of "{word}" in reverse order.',
    )
    return Task(prompt, answer, f"reverse {word}")


def count_letter(rng: Random) -> Task:
    """Count a letter in a made-up word, keeping a running count."""
    word = made_up_word(rng)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(CONSONANTS)
    lines, seen = [], 0
    for each in word:
        seen += each == letter
        lines.append(f"{each}: {seen}")
    lines.append(f'The letter "{letter}" occurs {seen} times.')
    prompt = ask(
        rng,
        f'How many times does the letter "{letter}" occur in "{word}"?',
        f'Count the letter "{letter}" in the word "{word}".',
    )
    return Task(prompt, "\n".join(lines), f"count {letter} in {word}")


def alphabet(rng: Random) -> Task:
    """Sort words that begin with different letters."""
    by_first = {word[0]: word for word in rng.sample(WORDS, len(WORDS))}
    chosen = rng.sample(sorted(by_first.values()), rng.randrange(3, 8))
    lines = [f"{word[0]}: {word}" for word in chosen]
    lines.append("In order:")
    lines += [f"{i}. {word}" for i, word in enumerate(sorted(chosen), 1)]
    listed = ", ".join(chosen)
    prompt = ask(
        rng,
        f"Sort these words alphabetically: {listed}",
        f"Put the words {listed} in alphabetical order.",
    )
    return Task(prompt, "\n".join(lines), f"alphabet {' '.join(sorted(chosen))}")


def acronym(rng: Random) -> Task:
    """Make an acronym of capitalised words."""
    parts = [word.capitalize() for word in rng.sample(WORDS, rng.randrange(3, 7))]
    lines = [f"{word} -> {word[0]}" for word in parts]
    lines.append(f"Acronym: {'.'.join(word[0] for word in parts)}")
    name = " ".join(parts)
    prompt = ask(
        rng,
        f'Make an acronym from "{name}".',
        f'What is the acronym of "{name}"?',
    )
    return Task(prompt, "\n".join(lines), f"acronym {name}")


def _exotic_word(rng: Random) -> str:
    first, last = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 4)))


def repeat(rng: Random) -> Task:
    """Copy a line of words, made-up words, digits and other scripts."""
    makers = (
        lambda: rng.choice(WORDS),
        lambda: made_up_word(rng),
        lambda: str(rng.randrange(1000)),
        lambda: _exotic_word(rng),
    )
    text = " ".join(
        make() for make in rng.choices(makers, weights=(3, 2, 1, 2), k=rng.randrange(3, 9))
    )
    prompt = rng.choice(
        (
            f"Repeat this text exactly: {text}",
            f"Copy the following line: {text}",
            f"Say this back to me: {text}",
        )
    )
    return Task(prompt, text, f"repeat {text}")


def outline(rng: Random) -> Task:
    """Turn a comma-separated list into bullets or a numbered list."""
    points = rng.sample(WORDS, rng.randrange(4, 11))
    numbered = rng.random() < 0.5
    marks = [f"{i}." if numbered else "-" for i in range(1, len(points) + 1)]
    lines = [f"{mark} {word.capitalize()}" for mark, word in zip(marks, points, strict=True)]
    style, listed = "a numbered list" if numbered else "bullet points", ", ".join(points)
    prompt = ask(
        rng,
        f"Turn this into {style}: {listed}",
        f"Format as {style}: {listed}",
        f"Rewrite the list {listed} as {style}.",
    )
    return Task(prompt, "\n".join(lines), f"{style} {listed}")


TEXT_KINDS: dict[str, MakeTask] = {
    "reverse": reverse,
    "count_letter": count_letter,
    "alphabet": alphabet,
    "acronym": acronym,
    "repeat": repeat,
    "outline": outline,
}
