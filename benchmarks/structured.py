"""Structured answers: whole and valid, the same with drafts and without, and what they cost.

    python -m benchmarks.structured [--items 500] [--slots 16] [--repeats 3] [--family tiny]
                                    [--target MODEL --drafter MODEL] [--max-tokens 160]

Prints one JSON line. `schemas`: the items over twenty schemas, greedy and at temperature 1, with
drafts and plainly; how many parse and validate (`jsonschema`), whether both give the same token
ids, and the accept length beside that of the same items without a schema. `speed`: the same prompts
unconstrained and under a grammar that allows any text, so that both say the same, in turns; medians
of tokens per second, their ratio, and the share of the time in which the host asked the grammars.
`orders_speed`: the same for a job that the bundled pair knows, orders as JSON, under its schema;
the free answers stand in a fence, the others do not. `schema_speed`: the same for the schemas, of
which the pair knows none.
"""

import argparse
import json
import time
from statistics import median

import jsonschema

from benchmarks.common import held_out_records, print_line, requests, spread, surroundings
from dspark_batch.answers import steering
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.pair import load_pair
from dspark_batch.spec.structure import structure_of
from dspark_batch.types import Failure, Request, Sampling

ANY_TEXT = "(?s:.*)"
MAX_TOKENS = 160


def text(most=12):
    return {"type": "string", "maxLength": most}


def bounds(least, most):
    return {"minimum": least, "maximum": most}


def integer(least=0, most=999):
    return {"type": "integer", **bounds(least, most)}


def listed(items, most=3, **more):
    return {"type": "array", "items": items, "maxItems": most, **more}


def record(**properties):
    """An object with all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


ORDER = record(customer=text(), item=text(), colour=text(), quantity=integer(), price=integer())
POINT = record(x=integer(-99, 99), y=integer(-99, 99))
LABEL = {"enum": ["positive", "negative", "neutral"]}
SCHEMAS = [
    record(name=text(), age=integer(0, 120)),
    record(label=LABEL),
    record(label=LABEL, reason=text(24)),
    record(spam={"type": "boolean"}),
    record(tags=listed(text(6))),
    record(tags=listed({"enum": ["a", "b", "c"]}, minItems=1)),
    record(point=POINT),
    record(path=listed(POINT, 2)),
    {"type": "array", "items": integer(), "minItems": 1, "maxItems": 4},
    {"enum": ["yes", "no"]},
    record(value={"anyOf": [integer(), {"type": "null"}]}),
    record(kind={"const": "sea"}, depth={"type": "number", "multipleOf": 0.5, **bounds(0, 9)}),
    record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    record(day={"type": "string", "format": "date"}),
    {"type": "object", "properties": {"a": text(4), "b": integer()}, "required": ["b"]},
    record(left=record(deep=record(er=text(5)))),
    record(first={"$ref": "#/$defs/p"}, second={"$ref": "#/$defs/p"}) | {"$defs": {"p": POINT}},
    {"anyOf": [record(text=text(8)), record(number=integer())]},
    {"type": "array", "prefixItems": [text(5), integer()], "items": False, "minItems": 2},
    record(answer=text(10), score=integer(1, 5), sure={"type": "boolean"}),
]


def asked(pair, prompts, max_tokens, structures, temperature=0.0):
    """Ask each prompt for the next of the structures."""
    return [
        Request(
            request.item,
            request.prompt_ids,
            request.max_tokens,
            Sampling(temperature=temperature, structure=structures[n % len(structures)]),
        )
        for n, request in enumerate(requests(pair, prompts, max_tokens))
    ]


def orders(count):
    """Ask for the fields of orders, as the bundled pair was taught."""
    people, things = ("Maria", "Henry", "Felix", "Cyrus", "Elena"), ("lemon", "apple", "plum")
    colours = ("green", "white", "red", "blue")
    return [
        "Extract customer, item, colour, quantity and price as JSON: "
        f"For {40 + n % 50} euros, {people[n % 5]} gets {7 + n % 30} {colours[n % 4]} "
        f"{things[n % 3]} boxes."
        for n in range(count)
    ]


class Masks:
    """Counts the seconds in which the host asks the grammars."""

    def __init__(self):
        self.seconds = 0.0
        real, made = steering._Allowed.__call__, steering._Allowed.__init__

        def timed(method):
            def call(allowed, *arguments):
                began = time.perf_counter()
                try:
                    return method(allowed, *arguments)
                finally:
                    self.seconds += time.perf_counter() - began

            return call

        steering._Allowed.__call__, steering._Allowed.__init__ = timed(real), timed(made)


def answered(pair, setup, work, **settings):
    """Answer; return the completions by index, and the seconds."""
    engine = Engine(pair, slots=setup.plan.slots, shapes=setup.shapes, **settings)
    began = time.perf_counter()
    outcomes = list(engine.generate(work))
    seconds = time.perf_counter() - began
    failed = [outcome.message for outcome in outcomes if isinstance(outcome, Failure)]
    if failed:
        raise SystemExit(failed[0])
    return {outcome.item.index: outcome for outcome in outcomes}, seconds


def ids(answers):
    return {index: answer.token_ids for index, answer in answers.items()}


def accept_length(answers):
    lengths = [length for answer in answers.values() for length in answer.accept_lengths]
    return round(sum(lengths) / max(1, len(lengths)), 3)


def counted(answers):
    """Count the answers that are whole, that parse and that validate."""
    whole = [n for n, answer in answers.items() if answer.structure.parsed]
    valid = 0
    for n in whole:
        value = json.loads(answers[n].text)
        valid += jsonschema.Draft202012Validator(SCHEMAS[n % len(SCHEMAS)]).is_valid(value)
    return {"items": len(answers), "whole": len(whole), "valid": valid}


def look(pair, setup, prompts, max_tokens, temperature):
    """Compare the answers to the schemas with drafts and without."""
    structures = [structure_of("json_schema", schema) for schema in SCHEMAS]
    work = asked(pair, prompts, max_tokens, structures, temperature)
    drafted, _ = answered(pair, setup, work)
    plain, _ = answered(pair, setup, work, draft_length=0)
    free, _ = answered(pair, setup, asked(pair, prompts, max_tokens, [None], temperature))
    return counted(drafted) | {
        "same_as_plain": ids(drafted) == ids(plain),
        "accept_length": accept_length(drafted),
        "accept_length_free": accept_length(free),
    }


def compare(pair, setup, prompts, max_tokens, structures, repeats):
    """Answer freely and under structures, in turns."""
    masks, rates, shares = Masks(), {"free": [], "bound": []}, []
    answers = {"free": [], "bound": []}
    works = {
        "free": asked(pair, prompts, max_tokens, [None]),
        "bound": asked(pair, prompts, max_tokens, structures),
    }
    said = {}
    for turn in range(1 + repeats):  # the first one warms up
        for name in ("free", "bound") if turn % 2 else ("bound", "free"):
            masks.seconds = 0.0
            said[name], seconds = answered(pair, setup, works[name])
            if turn:
                tokens = sum(len(answer.token_ids) for answer in said[name].values())
                rates[name].append(tokens / seconds)
                answers[name].append(len(said[name]) / seconds)
                shares += [masks.seconds / seconds] if name == "bound" else []
    return {
        "tokens_per_s": {name: spread(each) for name, each in rates.items()},
        "ratio": round(median(rates["bound"]) / median(rates["free"]), 3),
        "answers_ratio": round(median(answers["bound"]) / median(answers["free"]), 3),
        "mask_share": round(median(shares), 3),
        "same_answers": ids(said["free"]) == ids(said["bound"]),
        "accept_length": {name: accept_length(each) for name, each in said.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--speed-items", type=int, default=64)
    parser.add_argument("--family")
    parser.add_argument("--target")
    parser.add_argument("--drafter")
    options = parser.parse_args()
    pair = load_pair(
        options.family, target=options.target, drafter=options.drafter, dtype="float32"
    )
    some = [each["prompt"] for each in held_out_records(options.items)]
    prompts = [f"{some[n % len(some)]}" for n in range(options.items)]
    max_tokens = min(options.max_tokens, MAX_TOKENS)
    setup = set_up(pair, slots=options.slots, max_tokens=max_tokens, num_items=options.items)
    schemas = [structure_of("json_schema", schema) for schema in SCHEMAS]
    timed = prompts[: options.speed_items]
    print_line(
        {
            "benchmark": "structured",
            **surroundings(),
            "slots": setup.plan.slots,
            "schemas": {
                name: look(pair, setup, prompts, max_tokens, temperature)
                for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
            },
            "speed": compare(
                pair,
                setup,
                timed,
                max_tokens,
                [structure_of("regex", ANY_TEXT)],
                options.repeats,
            ),
            "orders_speed": compare(
                pair,
                setup,
                orders(options.speed_items),
                max_tokens,
                [structure_of("json_schema", ORDER)],
                options.repeats,
            ),
            "schema_speed": compare(pair, setup, timed, max_tokens, schemas, options.repeats),
        }
    )


if __name__ == "__main__":
    main()
