"""Records: JSON from a sentence or from CSV, and look-ups in a table."""

import json
from random import Random

from recipes.tiny.tasks.task import MakeTask, Task, ask, words

NAMES = words(
    "Anna Ben Carla David Elena Felix Greta Henry Irene James Katya Liam Maria Nora Oscar Petra "
    "Quinn Rosa Samuel Tara Ugo Vera Walter Xenia Yusuf Zara Amir Bella Cyrus Dalia"
)
CITIES = words(
    "Paris London Rome Madrid Berlin Vienna Prague Oslo Lisbon Dublin Athens Warsaw Cairo Tokyo "
    "Delhi Lima Boston Denver Toronto Sydney Seoul Nairobi Zurich Milan Porto"
)
JOBS = words(
    "teacher nurse baker pilot farmer driver painter doctor lawyer writer singer plumber chef "
    "engineer librarian gardener"
)
FRUIT = words("apple pear plum lemon grape melon cherry peach mango orange banana kiwi fig lime")
COLOURS = words("red green blue yellow black white brown purple orange pink")


def _dump(value: object) -> str:
    return json.dumps(value, indent=2)


def json_person(rng: Random) -> Task:
    """Extract a person's name, age, city and job."""
    name, age = rng.choice(NAMES), rng.randrange(18, 90)
    city, job = rng.choice(CITIES), rng.choice(JOBS)
    sentence = rng.choice(
        (
            f"{name} is {age} years old, lives in {city} and works as a {job}.",
            f"{name}, a {job} from {city}, is {age}.",
            f"My neighbour {name} ({age}) moved to {city} to work as a {job}.",
            f"In {city} I met {name}, who is {age} and a {job}.",
        )
    )
    prompt = ask(
        rng,
        f"Extract name, age, city and job as JSON: {sentence}",
        f"Give the name, age, city and job in this sentence as JSON. {sentence}",
        f"Turn this sentence into JSON with the keys name, age, city and job: {sentence}",
    )
    answer = _dump({"name": name, "age": age, "city": city, "job": job})
    return Task(prompt, f"```json\n{answer}\n```", f"person {name} {age} {city} {job}")


def json_order(rng: Random) -> Task:
    """Extract an order's item, colour, quantity, price and customer."""
    item, colour = rng.choice(FRUIT), rng.choice(COLOURS)
    quantity, price, name = rng.randrange(2, 60), rng.randrange(2, 99), rng.choice(NAMES)
    sentence = rng.choice(
        (
            f"{name} ordered {quantity} {colour} {item} boxes for {price} euros.",
            f"Please send {quantity} {colour} {item} boxes to {name}; the price is {price} euros.",
            f"For {price} euros, {name} gets {quantity} {colour} {item} boxes.",
        )
    )
    prompt = ask(
        rng,
        f"Extract customer, item, colour, quantity and price as JSON: {sentence}",
        "Turn this order into JSON with the keys customer, item, colour, quantity and price: "
        + sentence,
    )
    order = {"customer": name, "item": item, "colour": colour, "quantity": quantity, "price": price}
    return Task(
        prompt, f"```json\n{_dump(order)}\n```", f"order {name} {item} {colour} {quantity} {price}"
    )


def _people(rng: Random, count: int) -> list[dict[str, object]]:
    return [
        {"name": name, "age": rng.randrange(18, 90), "city": city}
        for name, city in zip(rng.sample(NAMES, count), rng.sample(CITIES, count), strict=True)
    ]


def csv_to_json(rng: Random) -> Task:
    """Turn two to eight CSV rows into a JSON list."""
    people = _people(rng, rng.randrange(2, 9))
    table = "name,age,city\n" + "\n".join(f"{p['name']},{p['age']},{p['city']}" for p in people)
    prompt = rng.choice(
        (
            f"Convert this CSV to JSON:\n{table}",
            f"Turn the CSV below into a JSON list.\n{table}",
            f"Write these CSV rows as JSON objects.\n{table}",
        )
    )
    return Task(prompt, f"```json\n{_dump(people)}\n```", f"csv {table}")


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(rng: Random) -> Task:
    """Look one cell up in a small table."""
    fruit = rng.sample(FRUIT, rng.randrange(3, 7))
    header = ["item", "price", "stock", "colour"]
    rows = [
        [item, str(rng.randrange(2, 99)), str(rng.randrange(10, 999)), rng.choice(COLOURS)]
        for item in fruit
    ]
    row, column = rng.choice(rows), rng.randrange(1, 4)
    grid = _markdown(header, rows)
    question = ask(
        rng,
        f"What is the {header[column]} of the {row[0]}?",
        f"Look up the {header[column]} of the {row[0]} in the table.",
    )
    prompt = f"{grid}\n\n{question}" if rng.random() < 0.5 else f"{question}\n\n{grid}"
    answer = (
        f"The row of the {row[0]} is: | {' | '.join(row)} |\n"
        f"The {header[column]} of the {row[0]} is {row[column]}."
    )
    return Task(prompt, answer, f"{header[column]} of {row[0]} in {grid}")


def make_table(rng: Random) -> Task:
    """Write a list of people as a Markdown table."""
    people = _people(rng, rng.randrange(2, 6))
    sentences = " ".join(f"{p['name']} is {p['age']} and lives in {p['city']}." for p in people)
    prompt = ask(
        rng,
        f"Make a table with name, age and city: {sentences}",
        f"Write this as a Markdown table with the columns name, age and city. {sentences}",
    )
    answer = _markdown(["name", "age", "city"], [[str(v) for v in p.values()] for p in people])
    return Task(prompt, answer, f"make table {sentences}")


RECORD_KINDS: dict[str, MakeTask] = {
    "json_person": json_person,
    "json_order": json_order,
    "csv_to_json": csv_to_json,
    "table": table,
    "make_table": make_table,
}
