"""Plain and speculative decoding against mlx-lm: one process, same prompts, same token ids.

    python -m benchmarks.throughput [--items 32] [--repeats 5] [--batch-sizes 1 4 8 16 32]

Prints one JSON line. Tokens per second are medians over the repeats; the contestants take turns, so
that a slow minute of the machine hits all of them. Prefill is part of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step

from benchmarks.common import held_out_records, print_line, requests, spread, surroundings
from dspark_batch.engine.engine import Engine
from dspark_batch.models.load import load_pair

BATCH_SIZES = (1, 4, 8, 16, 32)
MAX_TOKENS = 256


def mlx_lm_generate(pair, work):
    """Answer with mlx-lm's single-stream generation."""
    answers = []
    for request in work:
        ids = []
        for token, _ in generate_step(
            mx.array(request.prompt_ids), pair.target.model, max_tokens=request.max_tokens
        ):
            ids.append(int(token))
            if ids[-1] in pair.config.stop_ids:
                break
        answers.append(tuple(ids))
    return answers


def mlx_lm_batch(pair, work, batch_size):
    """Answer with mlx-lm's BatchGenerator."""
    generator = BatchGenerator(
        pair.target.model,
        stop_tokens=[[token] for token in pair.config.stop_ids],
        completion_batch_size=batch_size,
        prefill_batch_size=min(batch_size, 8),
    )
    uids = generator.insert(
        [list(r.prompt_ids) for r in work], max_tokens=[r.max_tokens for r in work]
    )
    answers = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(int(response.token))
    generator.close()
    return [tuple(answers[uid]) for uid in uids]


def ours(pair, work, **settings):
    """Answer with the engine; returns completions in the order of the work."""
    completions = Engine(pair, **settings).generate(work)
    return sorted(completions, key=lambda c: c.item.index)


def contestants(pair, work, batch_sizes):
    """Map each contestant's name to a function that answers all of the work with token ids."""

    def batched(batch_size):
        return lambda: mlx_lm_batch(pair, work, batch_size)

    def engine(**settings):
        return lambda: [c.token_ids for c in ours(pair, work, **settings)]

    return {
        "mlx_lm_generate": lambda: mlx_lm_generate(pair, work),
        **{f"mlx_lm_batch_{size}": batched(size) for size in batch_sizes},
        "baseline": engine(draft_length=0),
        "speculation": engine(),
    }


def measure(items, repeats, batch_sizes):
    """Run all contestants in turns and compare what they said."""
    pair = load_pair()
    work = requests(pair, [r["prompt"] for r in held_out_records(items)], MAX_TOKENS)
    runs = contestants(pair, work, batch_sizes)
    answers = {name: run() for name, run in runs.items()}  # also the warm-up
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return summary(pair, work, answers, seconds)


def summary(pair, work, answers, seconds):
    """Turn answers and times into the benchmark's result."""
    reference = answers["mlx_lm_generate"]
    tokens = {name: sum(map(len, ids)) for name, ids in answers.items()}
    speed = {name: spread([tokens[name] / s for s in seconds[name]]) for name in answers}
    best_batch = max((name for name in speed if "batch" in name), key=lambda n: speed[n]["median"])
    rounds = [n for c in ours(pair, work) for n in c.accept_lengths]

    def ratio(name, other):
        return round(speed[name]["median"] / speed[other]["median"], 3)

    return {
        **surroundings(),
        "dtype": pair.config.dtype,
        "items": len(work),
        "tokens": tokens["mlx_lm_generate"],
        "tokens_per_s": speed,
        "best_mlx_lm_batch": best_batch,
        "accept_length": round(sum(rounds) / len(rounds), 3),
        "speculation_over_baseline": ratio("speculation", "baseline"),
        "speculation_over_mlx_lm_generate": ratio("speculation", "mlx_lm_generate"),
        "speculation_over_best_mlx_lm_batch": ratio("speculation", best_batch),
        "identical": answers["speculation"] == answers["baseline"] == reference,
        "items_different_from_mlx_lm": {
            name: sum(a != b for a, b in zip(ids, reference, strict=True))
            for name, ids in answers.items()
        },
    }


def with_bundled_blas(arguments):
    """Measure again in a process that keeps MLX's own BLAS, where there is a choice."""
    command = [sys.executable, "-m", "benchmarks.throughput", *arguments, "--only-this-blas"]
    environment = os.environ | {"DSPARK_BATCH_BLAS": "bundled"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--only-this-blas", action="store_true")
    options = parser.parse_args()
    result = measure(options.items, options.repeats, options.batch_sizes)
    if result["blas"] == "openblas" and not options.only_this_blas:
        numbers = ["--items", str(options.items), "--repeats", str(options.repeats)]
        numbers += ["--batch-sizes", *map(str, options.batch_sizes)]
        result["with_bundled_blas"] = with_bundled_blas(numbers)
    print_line({"benchmark": "throughput", **result})


if __name__ == "__main__":
    main()
