"""What a fleet costs and gives: items through one driver, and workers with a pair each beside one.

    python -m benchmarks.fleet [--parts null pair] [--workers 2] [--items 1000000] [--pair 4b]
                               [--slots 64] [--items-per-worker 512] [--answer-tokens 128]
                               [--without-ray]

`null`: workers that answer at once with one token, so all that costs is the driver, Ray and the
pickles. Memory is the driver's own, read every tenth of the items: `growth_mb` is what came on top
between the second reading and the last.

`pair`: a pair with random weights (`benchmarks.random_pair`) in each worker, plain decoding. First
one worker answers its share of items, then all workers answer as many each, and then once more
while one of them is killed at half time. `ratio` is that of the items per second, all over one,
without the kill. Answers must be equal, and so must `numerics`; every team has answered a few items
before its time begins, so all is compiled.

`--without-ray`: workers are threads of this process, for a look at the driver alone.
One JSON line; exit 1 if an answer is another.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from threading import Thread

from benchmarks.host import Memory, requests
from dspark_batch.fleet.fleet import Fleet
from dspark_batch.fleet.opener import Words, open_fleet
from dspark_batch.fleet.worker import Worker
from dspark_batch.opening import Opened
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Gauge, Item, Request, Said

AT_LEAST = 10_000  # items per second through the driver
MOST_GROWTH_MB = 20.0  # over a million items
SCALING = 0.93  # of a worker, for each
WORDS = Words(lambda messages: [1], partial(Said, None), lambda ids: "", frozenset())
_IDENTITY = dict.fromkeys(("target", "tokenizer", "chat_template", "drafter", "dtype"), "null")


class Null:
    """An engine that answers with one token, at once; has the rounds that a hub drives."""

    def __init__(self):
        self._waiting = []

    @property
    def is_idle(self):
        """Whether there is nothing to do."""
        return not self._waiting

    def add(self, request, *, urgent=False):
        """Let a request wait."""
        self._waiting.append(request)

    def step(self):
        """Answer all."""
        waiting, self._waiting = self._waiting, []
        return [_answer(request) for request in waiting]

    def cancel(self, item):
        """Nothing waits."""

    def so_far(self, item):
        """Nothing has begun."""


def _answer(request):
    return Completion(request.item, "a", (1,), "length", len(request.prompt_ids))


def open_null(spec, begun, num_items):
    """Load nothing."""
    gauge = Gauge(0.0, spec.slots, 0, 0, 0.0, 0.0)
    return Opened(Null(), WORDS.render, 4096, _IDENTITY, slots=spec.slots, gauge=lambda: gauge)


def open_random(spec, begun, num_items, *, size, folder):
    """Load a pair with random weights, and tell its process."""
    from benchmarks.random_pair import random_pair
    from dspark_batch.engine.engine import Engine
    from dspark_batch.engine.setup import set_up

    pair, _ = random_pair(size)
    setup = set_up(pair, slots=spec.slots, draft_length=0, max_tokens=spec.max_tokens)
    engine = Engine(
        pair,
        slots=spec.slots,
        draft_length=0,
        shapes=setup.shapes,
        most_positions=setup.most_positions,
        prefix_positions=0,
    )
    with Path(folder, "pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    identity = _IDENTITY | {"numerics": setup.conformance.numerics}
    return Opened(engine, WORDS.render, 4096, identity, spec.slots, setup.to_json(), engine.gauge)


class Here:
    """A worker that is a thread of this process."""

    def __init__(self, place, open_engine, tell):
        self._worker, self._is_closed = Worker(place, open_engine), False
        Thread(target=self._listen, args=(tell,), daemon=True).start()

    def put(self, asked, against):
        """Send requests."""
        self._worker.put(asked, against)

    def take_back(self, most):
        """Ask for requests."""
        self._worker.take_back(most)

    def part(self):
        """Keep nothing."""

    def close(self):
        """End it."""
        self._is_closed = True
        self._worker.end()

    def _listen(self, tell):
        tell(self._worker.hello())
        while not self._is_closed:
            for news in self._worker.news():
                tell(news)


def team(options, workers, there, **fields):
    """Begin a team, and wait until all of it is there; returns it opened."""
    spec = Spec(inputs=("-",), out="out.jsonl", workers=workers, slots=options.slots, **fields)
    if not options.without_ray:
        return open_fleet(spec, None, there=there, words=lambda spec: WORDS)
    fleet = Fleet(lambda *who: Here(who[0], partial(there, spec, None, None), who[2]), workers)
    for place in range(workers):
        fleet.begin(place)
    hello = fleet.first()
    return Opened(
        fleet, WORDS.render, 4096, hello.identity, hello.slots, gauge=fleet.gauge, close=fleet.close
    )


def null_part(options):
    """Drive null engines."""
    opened, memory = team(options, options.workers, open_null), Memory(options.items)
    try:
        list(opened.engine.generate(requests(1000 * options.workers, 1)))
        began, cpu_began, done = time.perf_counter(), time.process_time(), 0
        for _ in opened.engine.generate(requests(options.items, 1)):
            done += 1
            memory.at(done)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        by_worker = [worker["rows"] for worker in opened.gauge().workers]
    finally:
        opened.close()
    return {
        "items": done,
        "items_per_s": round(done / seconds, 1),
        "driver_cpu_us_per_item": round(1e6 * cpu_s / done, 1),
        "rows_by_worker": by_worker,
        **memory.told(),
    }


def work(count, options, first=0):
    """Make prompts of a few lengths."""
    for index in range(first, first + count):
        item = Item(index, str(index), f"{index:032x}", f"benchmark:{index}")
        prompt = tuple((index * 31 + k * 7) % 500 + 1 for k in range(64 + index % 128))
        yield Request(item, prompt, options.answer_tokens)


def answered(opened, asked, at_half=None):
    """Answer all; returns digests by index, and the seconds."""
    asked = list(asked)
    began, found = time.perf_counter(), {}
    for outcome in opened.engine.generate(asked):
        if not isinstance(outcome, Completion):
            raise SystemExit(f"fleet: {outcome.message}")
        found[outcome.item.index] = hashlib.sha256(repr(outcome.token_ids).encode()).hexdigest()
        if at_half and len(found) == len(asked) // 2:
            at_half()
    return found, time.perf_counter() - began


def pair_part(options):
    """Compare a team with one worker."""
    each = options.items_per_worker
    with tempfile.TemporaryDirectory() as folder:
        there = partial(open_random, size=options.pair, folder=folder)
        one = team(options, 1, there, max_tokens=options.answer_tokens)
        try:
            answered(one, work(options.slots, options, 10**6))
            alone, one_s = answered(one, work(each, options))
        finally:
            one.close()
        all_of_it = team(options, options.workers, there, max_tokens=options.answer_tokens)
        try:
            _wait_for(all_of_it, options)
            together, all_s = answered(all_of_it, work(each * options.workers, options))
            again = _with_a_kill(options, all_of_it, folder, together)
            told = [*all_of_it.gauge().workers]
        finally:
            all_of_it.close()
    differ = sum(together[index] != digest for index, digest in alone.items())
    rates = each / one_s, each * options.workers / all_s
    return {
        "pair": options.pair,
        "answer_tokens": options.answer_tokens,
        "items_per_s": {"one": round(rates[0], 2), "all": round(rates[1], 2)},
        "seconds": {"one": round(one_s, 1), "all": round(all_s, 1)},
        "ratio": round(rates[1] / rates[0], 3),
        "numerics": {"one": one.identity["numerics"], "all": all_of_it.identity["numerics"]},
        "workers": told,
        "differ": differ,
        **again,
    }


def _wait_for(opened, options):
    """Answer a few items again and again until every worker has answered some."""
    for attempt in range(1, 600):
        answered(opened, work(options.slots * options.workers, options, attempt * 10**6))
        if all(worker["rows"] for worker in opened.gauge().workers):
            return
    raise SystemExit("fleet: a worker never came; its numerics may be others.")


def _with_a_kill(options, opened, folder, expected):
    """Answer once more, and kill a worker at half time."""
    if options.without_ray:
        return {}

    def kill():
        os.kill(int(Path(folder, "pids").read_text().split()[-1]), signal.SIGKILL)

    found, seconds = answered(opened, work(len(expected), options), kill)
    differ = sum(found[index] != digest for index, digest in expected.items())
    deaths = sum(worker["deaths"] for worker in opened.gauge().workers)
    return {"killed": {"differ": differ, "seconds": round(seconds, 1), "deaths": deaths}}


PARTS = {"null": null_part, "pair": pair_part}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--pair", default="4b")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--items-per-worker", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--without-ray", action="store_true")
    options = parser.parse_args()
    parts = {}
    for name in options.parts:
        parts[name] = PARTS[name](options)
        print(json.dumps({name: parts[name]}), file=sys.stderr, flush=True)
    from benchmarks.common import print_line, surroundings

    chosen = {"workers": options.workers, "slots": options.slots, "ray": not options.without_ray}
    print_line({"benchmark": "fleet", **surroundings(), **chosen, **parts, "claims": claims(parts)})
    pair = parts.get("pair", {})
    if pair.get("differ") or pair.get("killed", {}).get("differ"):
        raise SystemExit(1)


def claims(parts):
    """List what must hold with what was reached."""
    null, pair, found = parts.get("null"), parts.get("pair"), []
    if null:
        found += [
            _claim("items per second through the driver", null["items_per_s"], least=AT_LEAST),
            _claim("memory of the driver on top, MB", null["growth_mb"], most=MOST_GROWTH_MB),
        ]
    if pair:
        least = SCALING * len(pair["workers"])
        found.append(_claim("items per second over one worker's", pair["ratio"], least=least))
    return found


def _claim(claim, reached, *, least=None, most=None):
    holds = reached is not None
    holds = holds and (least is None or reached >= least) and (most is None or reached <= most)
    limit = {"at_least": least} if least is not None else {"at_most": most}
    return {"claim": claim, **limit, "reached": reached, "holds": holds}


if __name__ == "__main__":
    main()
