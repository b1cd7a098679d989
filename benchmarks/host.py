"""What the host costs: items per second through the engine and through a whole job, no real model.

    python -m benchmarks.host [--items 20000] [--job-items 100000] [--slots 256] [--fsync-every 1]
                              [--profile] [--parts engine job rows]

`engine`: `Engine.generate` over requests in memory, with a target that computes next to nothing
(one cache layer of one number, a vocabulary of 16), by tokens per answer. What MLX takes to build
and run its few operations is part of it: on a CPU some 15 microseconds for each, however small, so
there are many slots. `cpu_us_per_item` is what all threads of the process took together. `job`: a
whole `run`, read, map, generate, append, finish, with that engine and one-token answers; `rows`:
the same with answers made in Python, so it is the job half alone. Memory is the process's own, read
every tenth of the rows: `growth_mb` is what came on top between the second reading and the last.

`--profile` prints where the host's time went to stderr. One JSON line.
"""

import argparse
import cProfile
import json
import pstats
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx

from benchmarks.common import print_line, surroundings
from dspark_batch.caches.positions import PositionCache
from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.models.target import PairConfig
from dspark_batch.opening import Opened
from dspark_batch.pair import Pair
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Item, Request

VOCABULARY = 16
IDENTITY = dict.fromkeys(("target", "tokenizer", "chat_template", "drafter", "dtype"), "null")
AT_LEAST = 20_000  # items per second
PROMPTS = [tuple((index + k) % VOCABULARY for k in range(4 + index % 12)) for index in range(48)]
MOST_GROWTH_MB = 2.0  # whatever the number of items


class NullTarget:
    """A target of one cache layer; the next token is the sum of all tokens so far."""

    facts = SimpleNamespace(vocab_size=VOCABULARY, num_layers=1)
    writes_in_place = False

    def make_cache(self, slots, positions):
        """Make keys and values for one layer."""
        return SlotCache([PositionCache], slots, positions)

    def __call__(self, tokens, cache, at=None):
        """Run a step over tokens [B, T]; see `Target`."""
        (layer,) = cache.layers
        mask = layer.make_mask(tokens.shape[1], return_array=True)  # [B, 1, T, C]
        written = tokens[:, None, :, None].astype(mx.float32)
        keys, _ = layer.update_and_fetch(written, written)
        seen = mx.where(mask[:, 0], keys[:, 0, None, :, 0], 0).sum(axis=-1)
        if at is not None:
            seen = mx.take_along_axis(seen, at, axis=1)
        following = (seen.astype(mx.int32) + 1) % VOCABULARY
        return (mx.arange(VOCABULARY) == following[..., None]).astype(mx.float32), None


class RowsOnly:
    """An engine that answers in Python."""

    def generate(self, stream, may_begin):
        """Answer each request with one token, at once; failures pass through."""
        for request in stream:
            if not isinstance(request, Request):
                yield request
            elif may_begin(request.item):
                yield _one_token(request)
            else:
                return


def _one_token(request):
    return Completion(
        item=request.item,
        text="a",
        token_ids=(1,),
        finish_reason="length",
        prompt_tokens=len(request.prompt_ids),
        prefill_s=0.0,
        decode_s=0.0,
    )


def null_engine(slots):
    """Make an engine whose models compute next to nothing; the only place that does."""
    config = PairConfig(None, "float32", 4096, frozenset(), dict(IDENTITY))
    return Engine(Pair(NullTarget(), None, NoDrafter(), config), slots=slots)


def render(messages):
    """Give every message, or plain text, a few tokens."""
    text = messages if isinstance(messages, str) else messages[-1]["content"]
    return [ord(letter) % VOCABULARY for letter in text[:16]]


def requests(count, max_tokens):
    """Make requests one after the other."""
    for index in range(count):
        item = Item(index, str(index), f"{index:032x}", f"benchmark:{index}")
        yield Request(item, PROMPTS[index % len(PROMPTS)], max_tokens)


def memory_bytes():
    """Read how much memory this process holds now; where nobody tells, the most it has held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return pages * resource.getpagesize()


class Memory:
    """Readings of this process's memory, one for each tenth of the items."""

    def __init__(self, items):
        self._every, self._next = max(1, items // 10), 0
        self.readings = []

    def at(self, done):
        """Read, if a further tenth is done."""
        if done >= self._next:
            self.readings.append(memory_bytes())
            self._next += self._every

    def told(self):
        """Tell how much came on top once everything was warm."""
        mb = [round(reading / 1e6, 1) for reading in self.readings]
        return {"memory_mb": mb, "growth_mb": round(mb[-1] - mb[1], 1) if len(mb) > 1 else None}


def engine_part(options):
    """Drive the engine alone, by tokens per answer."""
    found = {}
    for max_tokens in (1, 2, 16):
        items = max(options.slots, options.items // max_tokens)
        engine, memory = null_engine(options.slots), Memory(items)
        list(engine.generate(requests(options.slots, max_tokens)))
        before, done = engine.gauge(), 0
        began, cpu_began = time.perf_counter(), time.process_time()
        for outcome in engine.generate(requests(items, max_tokens)):
            if not isinstance(outcome, Completion):
                raise SystemExit(f"host: {outcome.message}")
            done += 1
            memory.at(done)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        gauge = engine.gauge()
        found[f"{max_tokens} tokens"] = {
            "items": done,
            "items_per_s": round(done / seconds, 1),
            "us_per_item": round(1e6 * seconds / done, 1),
            "cpu_us_per_item": round(1e6 * cpu_s / done, 1),
            "prefill_share": round((gauge.prefill_s - before.prefill_s) / seconds, 3),
            "round_share": round((gauge.round_s - before.round_s) / seconds, 3),
            **memory.told(),
        }
    return found


def job_part(options, engine):
    """Run a whole job with an engine, from a file to a file."""
    count, memory = options.job_items, Memory(options.job_items)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "prompts.jsonl", Path(folder) / "out.jsonl"
        with source.open("w") as lines:
            for index in range(count):
                lines.write(json.dumps({"prompt": f"prompt {index} of a job", "n": index}) + "\n")
        report = run(
            _spec(source, out, options),
            observe=lambda tick: memory.at(tick.done) if tick.outcome is not None else None,
            open_engine=lambda spec, manifest: Opened(engine, render, 4096, IDENTITY),
        )
    return {
        "items": report.succeeded,
        "items_per_s": round(count / report.decode_s, 1),
        "decode_s": round(report.decode_s, 2),
        "finish_s": round(report.finish_s, 2),
        **memory.told(),
    }


def _spec(source, out, options):
    return Spec(
        inputs=(str(source),),
        out=str(out),
        max_tokens=1,
        slots=options.slots,
        fsync_every=options.fsync_every,
    )


PARTS = {
    "engine": engine_part,
    "job": lambda options: job_part(options, null_engine(options.slots)),
    "rows": lambda options: job_part(options, RowsOnly()),
}


def measured(name, options):
    """Run a part, under the profiler if asked."""
    if not options.profile:
        return PARTS[name](options)
    profiler = cProfile.Profile()
    result = profiler.runcall(PARTS[name], options)
    print(f"== {name}", file=sys.stderr)
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    return result | {"profiled": True}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--job-items", type=int, default=100_000)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--fsync-every", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    parts = {}
    for name in options.parts:
        parts[name] = measured(name, options)
        print(json.dumps({name: parts[name]}), file=sys.stderr, flush=True)
    chosen = {"slots": options.slots, "fsync_every": options.fsync_every}
    print_line({"benchmark": "host", **surroundings(), **chosen, **parts, "claims": claims(parts)})


def claims(parts):
    """List what must hold with what was reached; None where something was not measured."""
    reached = parts.get("engine", {}).get("1 tokens", {}).get("items_per_s")
    grown = [parts[name]["growth_mb"] for name in ("job", "rows") if name in parts]
    return [
        {
            "claim": "items per second, engine with a null target, one-token answers",
            "at_least": AT_LEAST,
            "reached": reached,
            "holds": None if reached is None else reached >= AT_LEAST,
        },
        {
            "claim": "memory on top over a job, MB",
            "at_most": MOST_GROWTH_MB,
            "reached": max(grown, default=None),
            "holds": max(grown) <= MOST_GROWTH_MB if grown else None,
        },
    ]


if __name__ == "__main__":
    main()
