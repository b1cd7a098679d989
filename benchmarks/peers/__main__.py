"""Other engines on the same job, in turns: tokens per second of the wall and of the processor.

    python -m benchmarks.peers --environments FOLDER [--items 64] [--repeats 5]
        [--shared-tokens 200] [--engines mlx_lm mlx_vlm vllm_mlx mlx_dspark] [--search]

`python -m benchmarks.peers.environments FOLDER` makes the environments. Prints one JSON line, and a
table on stderr. Each engine has a process of its own, which waits while others have their turns;
all load the same OpenBLAS before MLX, the same float32 copy of the bundled pair, and answer the
same held-out prompts greedily. Every setting runs once before the turns. Of each engine the best by
the wall and the best by the processor take the turns, and those within CLOSE of them, in another
order each time. With --search settings of SEARCHED run, too. The log has every run as it ends, and
what engines print. Prefill is part of the time; nothing is kept from one turn to the next.
"""

import argparse
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median

from benchmarks.common import ROOT, held_out_records, print_line, requests, spread, surroundings
from benchmarks.exact import differences
from benchmarks.peers.pair import write_pair
from benchmarks.peers.protocol import Engine, EngineError
from benchmarks.throughput import processor, shared_tokens, stolen_share, system_of
from dspark_batch.pair import load_pair

MAX_TOKENS = 128
CLOSE = 1.05  # times as long as the best of the engine
FIRST = 8  # prompts of an engine's first run, which compiles

OURS = ({"drafts": True}, {"drafts": False})
# The best of a search, each: with nothing shared, and with a shared beginning.
SETTINGS = {
    "mlx_lm": [{"batch": 32}, {"batch": 64}],
    "mlx_vlm": [{"batch": n, "prefill": k} for n, k in ((32, 8), (32, 16), (64, 8))],
    "vllm_mlx": [{"batch": 32}, {"batch": 64}],
    "mlx_dspark": [
        {"mode": "slots", "slots": n, "drafts": k} for n, k in ((16, 7), (32, 7), (32, 4))
    ],
}
SHARED = {
    "mlx_lm": [{"batch": n, "shared": True} for n in (32, 64)],
    "mlx_vlm": [{"batch": n, "prefill": 8, "shared": True} for n in (32, 64)],
    "vllm_mlx": [{"batch": n, "shared": True} for n in (32, 64)],
    "mlx_dspark": [
        {"mode": "one", "drafts": 7},
        *({"mode": "slots", "slots": n, "drafts": 7} for n in (16, 32)),
    ],
}
SEARCHED = {
    "mlx_lm": [{"batch": n} for n in (1, 4, 8, 16)] + [{"batch": 32, "prefill": 32}],
    "mlx_vlm": [
        *({"batch": n, "prefill": n} for n in (1, 8, 16, 32, 64)),
        *({"batch": n, "prefill": 8} for n in (16, 64)),
    ],
    "vllm_mlx": [{"batch": n} for n in (4, 8, 16)] + [{"batch": 32, "prefill": 32}],
    "mlx_dspark": [
        *({"mode": "slots", "slots": n, "drafts": 7} for n in (1, 4, 8, 64)),
        *({"mode": "slots", "slots": n, "drafts": k} for n in (16, 32) for k in (2, 4)),
        {"mode": "slots", "slots": 16, "drafts": 7, "bits": 4},
        {"mode": "slots", "slots": 16, "drafts": 7, "bits": 8},
        *({"mode": "batch", "slots": n} for n in (16, 32, 64)),
        {"mode": "one", "drafts": 7},
        {"mode": "one", "drafts": 2},
    ],
}


def measure(options, log):
    """Start the engines, let them race, and compare what they said."""
    pair = load_pair(dtype="float32")
    system = system_of(pair, options.shared_tokens)
    prompts = [record["prompt"] for record in held_out_records(options.items)]
    work = requests(pair, prompts, options.max_tokens, system)
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder))
        engines, told, left_out = started(options, pair, Path(folder), log)
        try:
            runs, failed = race(engines, settings(options, engines), work, options, log)
        finally:
            for engine in engines.values():
                engine.close()
    return {
        **surroundings(),
        "cores": len(os.sched_getaffinity(0)),
        "items": len(work),
        "prompt_tokens": sum(len(request.prompt_ids) for request in work),
        "shared_tokens": shared_tokens(pair, system) if system else 0,
        "versions": told,
        "left_out": left_out | failed,
        **summary(pair, work, runs),
    }


def started(options, pair, folder, log):
    """Start and load all engines; returns them, their versions, and who could not be loaded why."""
    engines, told, left_out = {}, {}, {}
    for name in ("ours", *options.engines):
        python = options.environments / name / "bin" / "python"
        command = [sys.executable if name == "ours" else str(python)]
        command += ["-m", "benchmarks.peers.contestant", name]
        try:
            engine = Engine(command, environment(folder), log)
        except OSError as error:
            left_out[name] = str(error)
            continue
        try:
            told[name] = engine.ask(
                "load",
                target=str(folder / "target"),
                drafter=str(folder / "drafter"),
                stop_ids=sorted(pair.config.stop_ids),
            )
            engines[name] = engine
        except EngineError as error:
            left_out[name] = str(error)
            engine.close()
    if len({reply.pop("blas") for reply in told.values()}) > 1:
        raise EngineError("the engines have different BLAS libraries or threads")
    return engines, {name: reply["versions"] for name, reply in told.items()}, left_out


def environment(folder):
    """Give all engines the same library and threads, and a home with nothing kept in it."""
    chosen = os.environ.get("DSPARK_BATCH_BLAS", "auto")
    package = find_spec("scipy_openblas32")
    if chosen == "auto" and package:
        chosen = str(next(Path(package.origin).parent.glob("lib/libscipy_*.so")))
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DSPARK_BATCH_BLAS": chosen,
        "DSPARK_BATCH_CACHE": str(folder),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def settings(options, engines):
    """List each engine with each of its settings."""
    chosen = {"ours": [*OURS]}
    for name in options.engines:
        chosen[name] = [*(SHARED if options.shared_tokens else SETTINGS)[name]]
        if options.search:
            chosen[name] += [each for each in SEARCHED[name] if each not in chosen[name]]
    return [(name, setting) for name in engines for setting in chosen[name]]


def race(engines, entries, work, options, log):
    """Let all run once, and the best in turns.

    Returns:
        The replies of each entry that ran, by its name and a JSON text of its setting, and why
        others did not.
    """
    prompts = [list(request.prompt_ids) for request in work]

    def go(entry, prompts=prompts):
        name, setting = entry
        reply = engines[name].ask(
            "go", setting=setting, prompts=prompts, max_tokens=options.max_tokens
        )
        seconds = f"{reply['wall_s']:.2f} s, {reply['processor_s']:.2f} s of the processor"
        print(f"{label(entry)}, {len(prompts)} prompts: {seconds}", file=log, flush=True)
        return reply

    first, failed, began = {}, {}, set()
    for entry in entries:
        try:
            if entry[0] not in began:
                go(entry, prompts[:FIRST])
            began.add(entry[0])
            first[label(entry)] = go(entry)
        except EngineError as error:
            failed[label(entry)] = str(error)
    runs = {name: [] for name in first}
    left = [entry for entry in entries if label(entry) in close_to_best(first)]
    for turn in range(options.repeats):
        for entry in Random(turn).sample(left, len(left)):
            runs[label(entry)].append(go(entry))
    return {name: replies or [first[name]] for name, replies in runs.items()}, failed


def label(entry):
    """Name an entry: its engine and setting."""
    name, setting = entry
    return f"{name} {json.dumps(setting)}"


def close_to_best(first):
    """Name ours, and of each other engine who may be its best by either clock."""
    near = {name for name in first if name.startswith("ours")}
    for engine in {name.split()[0] for name in first}:
        mine = {name: reply for name, reply in first.items() if name.split()[0] == engine}
        for clock in ("wall_s", "processor_s"):
            best = min(reply[clock] for reply in mine.values())
            near |= {name for name, reply in mine.items() if reply[clock] <= CLOSE * best}
    return near


def summary(pair, work, runs):
    """Turn replies into speeds, ratios and differences."""
    reference = runs[label(("ours", OURS[1]))][0]["ids"]
    tokens = {name: sum(map(len, replies[0]["ids"])) for name, replies in runs.items()}
    speed = {
        clock: {
            name: {"runs": len(replies), **spread([tokens[name] / r[clock] for r in replies])}
            for name, replies in runs.items()
        }
        for clock in ("wall_s", "processor_s")
    }
    return {
        "tokens": tokens[label(("ours", OURS[1]))],
        "idle_s": round(max(r["idle_s"] for replies in runs.values() for r in replies), 3),
        "tokens_per_wall_s": speed["wall_s"],
        "tokens_per_processor_s": speed["processor_s"],
        "ours_over": {clock: ours_over(runs, clock) for clock in speed},
        "differences": {
            name: differences(pair, work, reference, replies[0]["ids"])
            for name, replies in runs.items()
        },
        "same_ids_in_every_turn": all(
            reply["ids"] == replies[0]["ids"] for replies in runs.values() for reply in replies
        ),
    }


def ours_over(runs, clock):
    """Compare our better side with the best entry of each engine: seconds of theirs over ours."""
    best = {}
    for name, replies in runs.items():
        best.setdefault(name.split()[0], []).append((median(r[clock] for r in replies), name))
    seconds, mine = min(best.pop("ours"))
    others = {min(entries)[1]: round(min(entries)[0] / seconds, 3) for entries in best.values()}
    return {"ours": mine, **others}


def table(result):
    """Show the result to people."""
    lines = ["| engine and setting | turns | tokens/s of the wall | of the processor | differ |"]
    lines.append("|---|---|---|---|---|")
    wall, cpu = result["tokens_per_wall_s"], result["tokens_per_processor_s"]
    for name in sorted(wall, key=lambda n: -cpu[n]["median"]):
        speeds = (
            f"{s['median']:.0f} ({s['min']:.0f} to {s['max']:.0f})" for s in (wall[name], cpu[name])
        )
        differ = len(result["differences"][name])
        lines.append(f"| {name} | {wall[name]['runs']} | {' | '.join(speeds)} | {differ} |")
    lines += [f"left out: {name}: {why}" for name, why in result["left_out"].items()]
    for clock, ratios in result["ours_over"].items():
        lines.append(f"ours over others, by {clock}: {json.dumps(ratios)}")
    return "\n".join(lines)


def main():
    """Print the line and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--engines", nargs="*", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared-tokens", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    options = parser.parse_args()
    options.environments = options.environments.absolute()
    before = processor()
    with options.log.open("w") as log:
        result = measure(options, log)
    stolen = round(stolen_share(before, processor()), 2)
    print_line({"benchmark": "peers", "stolen": stolen, **result})
    print(table(result), file=sys.stderr)


if __name__ == "__main__":
    main()
