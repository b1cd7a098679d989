"""Plain and speculative decoding against mlx-lm: one process, same prompts, same token ids.

    python -m benchmarks.throughput [--items 64] [--repeats 3] [--system-tokens 200]
                                    [--batch-sizes 1 4 8 16 32 64] [--slots 1 4 8 16 32]
                                    [--draft-lengths 0 3 7] [--no-generate]

Prints one JSON line. Tokens per second are medians over the repeats; the contestants take turns,
each time in another order, so that a slow minute of the machine hits all of them. Who was far from
the best of its side in the warm-up takes no turns; the warm-up is its one run. Prefill is part of
the time. `speculation_auto` is the program's own plan, and `speculation_again` the same once more:
`auto_over_itself` says what a ratio means on this machine, and `stolen` which share of its
processors' time a virtual machine did not get during the turns. `by_processor` holds the same
ratios of processor time, which nobody steals; it means something where one thread computes. The
others are a grid of static plans, slots by draft length. mlx-lm's side runs as it does by itself:
its own caches, and products over as many rows as there are. With --system-tokens the prompts share
a beginning, their system prompt, of at least so many tokens and at most one sentence more;
`shared_tokens` says how many. --no-generate leaves mlx-lm's answers one by one out, which take most
of the time and are never the fastest.
"""

import argparse
import time
from itertools import count, product, takewhile
from pathlib import Path
from random import Random

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step

from benchmarks.common import held_out_records, print_line, requests, spread, surroundings
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.pair import load_pair

BATCH_SIZES = (1, 4, 8, 16, 32, 64)
SLOTS = (1, 4, 8, 16, 32)
DRAFT_LENGTHS = (0, 3, 7)
MAX_TOKENS = 128
FAR = 1.6  # times as long as the best of its side
SENTENCE = "You answer short questions about words, numbers and lists, exactly as they are asked. "


def mlx_lm_generate(pair, work):
    """Answer with mlx-lm's single-stream generation."""
    with as_they_come():
        return [_one_by_mlx_lm(pair, request) for request in work]


def _one_by_mlx_lm(pair, request):
    ids = []
    for token, _ in generate_step(
        mx.array(request.prompt_ids), pair.target.model, max_tokens=request.max_tokens
    ):
        ids.append(int(token))
        if ids[-1] in pair.config.stop_ids:
            break
    return tuple(ids)


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
    with as_they_come():
        while responses := generator.next_generated():
            for response in responses:
                answers[response.uid].append(int(response.token))
    generator.close()
    return [tuple(answers[uid]) for uid in uids]


def ours(pair, work, **settings):
    """Answer with the engine; returns completions in the order of the work."""
    completions = Engine(pair, **settings).generate(work)
    return sorted(completions, key=lambda c: c.item.index)


def shared_tokens(pair, system):
    """Count the tokens that any two rendered prompts with this system prompt begin with."""
    one, other = (r.prompt_ids for r in requests(pair, "ab", 1, system))
    alike = takewhile(lambda ids: ids[0] == ids[1], zip(one, other, strict=False))
    return len(list(alike))


def system_of(pair, tokens):
    """Take as many sentences as prompts need to share so many tokens; None: they need none."""
    systems = (SENTENCE * number for number in count(1))
    return next(s for s in systems if shared_tokens(pair, s) >= tokens) if tokens else None


def contestants(pair, setup, work, options):
    """Map each contestant's name to a function that answers all of the work with token ids."""

    def batched(batch_size):
        return lambda: mlx_lm_batch(pair, work, batch_size)

    def engine(**settings):
        settings = {"shapes": setup.shapes, "most_positions": setup.most_positions} | settings
        return lambda: [c.token_ids for c in ours(pair, work, **settings)]

    automatic = {"slots": setup.plan.slots, "lengths": setup.lengths, "costs": setup.costs}
    grid = list(product(options.slots, options.draft_lengths))
    one_by_one = {"mlx_lm_generate": lambda: mlx_lm_generate(pair, work)}
    return {
        **({} if options.no_generate else one_by_one),
        **{f"mlx_lm_batch_{size}": batched(size) for size in options.batch_sizes},
        "speculation_auto": engine(**automatic),
        "speculation_again": engine(**automatic),
        **{f"slots_{n}_drafts_{k}": engine(slots=n, draft_length=k) for n, k in grid},
    }


def measure(options):
    """Run all contestants in turns and compare what they said."""
    pair = load_pair(dtype=options.dtype)
    setup = set_up(pair, max_tokens=MAX_TOKENS, num_items=options.items)
    system = system_of(pair, options.system_tokens)
    prompts = [r["prompt"] for r in held_out_records(options.items)]
    work = requests(pair, prompts, MAX_TOKENS, system)
    runs = contestants(pair, setup, work, options)
    answers, first = {}, {}
    for name, run in runs.items():  # the warm-up
        answers[name], first[name] = timed(run)
    close, before = near_the_best(first), processor()
    seconds = {name: [] if name in close else [took] for name, took in first.items()}
    for turn in range(options.repeats):
        for name in Random(turn).sample(close, len(close)):
            seconds[name].append(timed(runs[name])[1])
    shared = {"shared_tokens": shared_tokens(pair, system) if system else 0}
    stolen = {"stolen": round(stolen_share(before, processor()), 2)}
    return shared | stolen | summary(pair, setup, work, answers, seconds)


def processor():
    """Read what the processors did since they began, in the fields of Linux; elsewhere nothing."""
    stat = Path("/proc/stat")
    return list(map(int, stat.read_text().split()[1:9])) if stat.exists() else [0] * 8


def stolen_share(before, after):
    """Say what share of the time in which we could have run the host of this machine took."""
    spent = [b - a for a, b in zip(before, after, strict=True)]
    user, nice, system, _, _, irq, softirq, steal = spent
    return steal / max(1, user + nice + system + irq + softirq + steal)


def timed(run):
    """Return what it returns, and its seconds: by the clock on the wall, and of the processors."""
    wall, processor = time.perf_counter(), time.process_time()
    return run(), (time.perf_counter() - wall, time.process_time() - processor)


def near_the_best(seconds):
    """Name who may be the best of mlx-lm's or of our side by either clock, and the automatic plan.

    Takes the seconds of one run of each, see `timed`.
    """
    theirs = [name for name in seconds if "mlx_lm" in name]
    ours = [name for name in seconds if name not in theirs]
    near = {name for name in seconds if "speculation" in name}
    for side in (theirs, ours):
        for clock in (0, 1):
            best = min(seconds[name][clock] for name in side)
            near |= {name for name in side if seconds[name][clock] <= FAR * best}
    return [name for name in seconds if name in near]


def summary(pair, setup, work, answers, seconds):
    """Turn answers and times into the benchmark's result."""
    reference = next(iter(answers.values()))  # mlx-lm's
    tokens = {name: sum(map(len, ids)) for name, ids in answers.items()}
    speed, processor_speed = (
        {
            name: {"runs": len(took), **spread([tokens[name] / each[clock] for each in took])}
            for name, took in seconds.items()
        }
        for clock in (0, 1)
    )
    exact = [name for name in answers if "mlx_lm" not in name]
    return {
        **surroundings(),
        "dtype": pair.config.dtype,
        "items": len(work),
        "prompt_tokens": sum(len(r.prompt_ids) for r in work),
        "tokens": sum(map(len, reference)),
        "plan": setup.plan.why,
        "tokens_per_s": speed,
        **ratios(speed),
        "by_processor": ratios(processor_speed),
        "identical": len({tuple(answers[name]) for name in exact}) == 1,
        "items_different_from_mlx_lm": {
            name: sum(a != b for a, b in zip(ids, reference, strict=True))
            for name, ids in answers.items()
        },
    }


def ratios(speed):
    """Compare the automatic plan with the best of either side."""

    def best(part):
        return max((n for n in speed if part in n), key=lambda n: speed[n]["median"])

    def ratio(name, other):
        return round(speed[name]["median"] / speed[other]["median"], 3)

    return {
        "best_mlx_lm": best("mlx_lm"),
        "best_static": best("slots_"),
        "auto_over_best_mlx_lm": ratio("speculation_auto", best("mlx_lm")),
        "auto_over_itself": ratio("speculation_auto", "speculation_again"),
        "auto_over_best_static": ratio("speculation_auto", best("slots_")),
    }


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--system-tokens", type=int, default=0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS)
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=DRAFT_LENGTHS)
    parser.add_argument("--no-generate", action="store_true")
    parser.add_argument("--dtype")
    print_line({"benchmark": "throughput", **measure(parser.parse_args())})


if __name__ == "__main__":
    main()
