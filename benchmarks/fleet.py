"""What a fleet costs and gives: items through one driver, and workers with a pair each beside one.

    python -m benchmarks.fleet [--parts null pair] [--workers 1 2 4] [--items 1000000] [--pair 4b]
                               [--slots 64] [--profile math] [--items-per-worker 512]
                               [--answer-tokens 128] [--without-ray]

`null`: workers that answer at once with one token, so all that costs is the driver, Ray and the
pickles. As many as the largest of `--workers`. Memory is the driver's own, read every tenth of the
items: `growth_mb` is what came on top between the second reading and the last.

`pair`: a pair with random weights (`benchmarks.random_pair`) in each worker. It decodes with
drafts, of which so many are right as the profile says (`benchmarks.rehearsal`), or with `--profile
none` without. One team grows from the first of `--workers` to the last, so the workers of a
smaller team are workers of the larger one. Each team answers as many items for each of its workers,
of 1 to twice `--answer-tokens` tokens, after a smaller job of the same kind, in which all is
compiled. `ratio` is that of the items per second over the first team's. Then the last team answers
its items again, while one of its workers is killed at half time. Answers must be equal, and so must
`numerics` of all workers.

`--without-ray`: workers are threads of this process, for a look at the driver alone.
Every reading goes to stderr at once; one JSON line at the end; exit 1 if an answer is another.
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
from random import Random
from threading import Thread

from benchmarks.host import Memory, render, requests
from dspark_batch.fleet.fleet import Fleet
from dspark_batch.fleet.worker import Worker
from dspark_batch.opening import Opened
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Gauge, Item, Request

AT_LEAST = 10_000  # items per second through the driver
MOST_GROWTH_MB = 20.0  # over a million items
SCALING = {2: 1.9, 4: 3.7}  # workers -> times the items per second of one
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
    return Opened(Null(), render, 4096, _IDENTITY, slots=spec.slots, gauge=lambda: gauge)


def open_random(spec, begun, num_items, *, size, profile, folder):
    """Load a pair with random weights, and tell its process."""
    from benchmarks.random_pair import random_pair
    from benchmarks.rehearsal import PROFILES, rehearse
    from dspark_batch.engine.engine import Engine
    from dspark_batch.engine.setup import set_up

    pair, follower = random_pair(size)
    drafts = 0
    if profile != "none":
        rehearse(pair.drafter, follower, PROFILES[profile])
        drafts = pair.drafter.block_size
    setup = set_up(pair, slots=spec.slots, draft_length=drafts, max_tokens=spec.max_tokens)
    engine = Engine(
        pair,
        slots=spec.slots,
        draft_length=drafts,
        shapes=setup.shapes,
        most_positions=setup.most_positions,
        prefix_positions=0,
    )
    with Path(folder, "pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    identity = _IDENTITY | {"numerics": setup.conformance.numerics}
    return Opened(engine, render, 4096, identity, spec.slots, setup.to_json(), engine.gauge)


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


class Team:
    """Workers at places; begun when they are wanted.

    Args:
        options: of this benchmark.
        there: opens an engine in a worker.
        fields: of the job, for `there`.
    """

    def __init__(self, options, there, **fields):
        workers = options.workers[-1]
        spec = Spec(inputs=("-",), out="-", workers=workers, slots=options.slots, **fields)
        self._opener, self._cluster = partial(there, spec, None, None), None
        if not options.without_ray:
            from dspark_batch.fleet.cluster import Cluster

            self._cluster = Cluster(spec)
        self.numerics = []  # of every worker that came
        self.fleet = Fleet(self._spawn, workers, self._note)
        self.size = 0

    def grow(self, size):
        """Begin workers until there are so many."""
        for place in range(self.size, size):
            self.fleet.begin(place)
        self.size = size

    def rows(self):
        """Tell how much each worker has answered."""
        gauge = self.fleet.gauge()
        return [worker["rows"] for worker in gauge.workers[: self.size]] if gauge else [0]

    def close(self):
        """End all workers."""
        self.fleet.close()
        if self._cluster is not None:
            self._cluster.close()

    def _spawn(self, place, slots, tell):
        if self._cluster is None:
            return Here(place, self._opener, tell)
        return self._cluster.spawn(place, self._opener, tell)

    def _note(self, hello):
        self.numerics.append(hello.identity.get("numerics"))


def null_part(options):
    """Drive null engines."""
    team, memory = Team(options, open_null), Memory(options.items)
    try:
        team.grow(options.workers[-1])
        while not all(team.rows()):
            list(team.fleet.generate(requests(1000 * team.size, 1)))
        before = team.rows()
        began, cpu_began, done = time.perf_counter(), time.process_time(), 0
        for _ in team.fleet.generate(requests(options.items, 1)):
            done += 1
            memory.at(done)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        rows = [after - earlier for earlier, after in zip(before, team.rows(), strict=True)]
    finally:
        team.close()
    return {
        "workers": team.size,
        "items": done,
        "items_per_s": round(done / seconds, 1),
        "driver_cpu_us_per_item": round(1e6 * cpu_s / done, 1),
        "rows_by_worker": rows,
        **memory.told(),
    }


def work(count, options, first=0):
    """Make prompts and answers of many lengths."""
    for index in range(first, first + count):
        rng = Random(index)
        item = Item(index, str(index), f"{index:032x}", f"benchmark:{index}")
        prompt = tuple(rng.choices(range(1, 500), k=rng.randint(64, 192)))
        yield Request(item, prompt, rng.randint(1, 2 * options.answer_tokens))


def answered(team, asked, at_half=None):
    """Answer all; returns digests by index, tokens, and the seconds."""
    asked, found, tokens = list(asked), {}, 0
    began = time.perf_counter()
    for outcome in team.fleet.generate(asked):
        if not isinstance(outcome, Completion):
            raise SystemExit(f"fleet: {outcome.message}")
        tokens += len(outcome.token_ids)
        found[outcome.item.index] = hashlib.sha256(repr(outcome.token_ids).encode()).hexdigest()
        if at_half and len(found) == len(asked) // 2:
            at_half()
    return found, tokens, time.perf_counter() - began


def pair_part(options):
    """Let a team grow, and kill one of it."""
    readings, known = [], {}
    with tempfile.TemporaryDirectory() as folder:
        there = partial(open_random, size=options.pair, profile=options.profile, folder=folder)
        team = Team(options, there, max_tokens=2 * options.answer_tokens)
        try:
            for size in options.workers:
                began = time.perf_counter()
                team.grow(size)
                _warm_up(team, options)
                readings.append({"ready_s": round(time.perf_counter() - began, 1)})
                readings[-1] |= _reading(team, options, known, readings)
                print(json.dumps(readings[-1]), file=sys.stderr, flush=True)
            killed = {} if options.without_ray else _with_a_kill(team, options, known, folder)
            told = team.fleet.gauge().workers
        finally:
            team.close()
    return {
        "pair": options.pair,
        "profile": options.profile,
        "answer_tokens": options.answer_tokens,
        "teams": readings,
        "killed": killed,
        "numerics": sorted({*team.numerics}),
        "workers": told,
    }


def _warm_up(team, options):
    """Answer a small job again and again until every worker is there, and then twice more."""
    for first in range(10**6, 10**9, 10**6):
        is_complete = len(team.numerics) >= team.size
        answered(team, work(2 * options.slots * team.size, options, first))
        if is_complete:
            answered(team, work(2 * options.slots * team.size, options, first + 10**9))
            return
    raise SystemExit("fleet: a worker never came.")


def _reading(team, options, known, earlier, at_half=None):
    """Answer a job; `known` are digests by index, and gets those that are new."""
    items, before = options.items_per_worker * team.size, team.rows()
    cpu_began = time.process_time()
    found, tokens, seconds = answered(team, work(items, options), at_half)
    cpu_s = time.process_time() - cpu_began
    differ = sum(known.setdefault(index, digest) != digest for index, digest in found.items())
    rate = items / seconds
    first = earlier[0].get("items_per_s", rate)
    return {
        "workers": team.size,
        "items": items,
        "seconds": round(seconds, 2),
        "items_per_s": round(rate, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "ratio": round(rate / first, 3),
        "rows_by_worker": [a - b for b, a in zip(before, team.rows(), strict=True)],
        "driver_cpu_s": round(cpu_s, 2),
        "differ": differ,
    }


def _with_a_kill(team, options, known, folder):
    """Answer once more, and kill the worker that came last at half time."""

    def kill():
        os.kill(int(Path(folder, "pids").read_text().split()[-1]), signal.SIGKILL)

    reading = _reading(team, options, known, [{}], kill)
    deaths = sum(worker["deaths"] for worker in team.fleet.gauge().workers)
    return {name: reading[name] for name in ("items", "seconds", "differ")} | {"deaths": deaths}


PARTS = {"null": null_part, "pair": pair_part}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--pair", default="4b")
    parser.add_argument("--profile", choices=("none", "math", "code", "chat"), default="math")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--items-per-worker", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--without-ray", action="store_true")
    options = parser.parse_args()
    options.workers = sorted({*options.workers})  # a team only grows
    parts = {}
    for name in options.parts:
        parts[name] = PARTS[name](options)
        print(json.dumps({name: parts[name]}), file=sys.stderr, flush=True)
    from benchmarks.common import print_line, surroundings

    chosen = {"slots": options.slots, "ray": not options.without_ray}
    print_line({"benchmark": "fleet", **surroundings(), **chosen, **parts, "claims": claims(parts)})
    pair = parts.get("pair")
    if pair and sum(reading.get("differ", 0) for reading in [*pair["teams"], pair["killed"]]):
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
        found += [
            _claim(f"{team['workers']} workers over one", team["ratio"], least=SCALING[size])
            for team in pair["teams"]
            if (size := team["workers"]) in SCALING and pair["teams"][0]["workers"] == 1
        ]
        found.append(_claim("numerics of all workers", len(pair["numerics"]), most=1))
    return found


def _claim(claim, reached, *, least=None, most=None):
    holds = reached is not None
    holds = holds and (least is None or reached >= least) and (most is None or reached <= most)
    limit = {"at_least": least} if least is not None else {"at_most": most}
    return {"claim": claim, **limit, "reached": reached, "holds": holds}


if __name__ == "__main__":
    main()
