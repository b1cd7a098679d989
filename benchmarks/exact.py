"""How exact decoding is on this device: speculation, plain decoding, mlx-lm, on the same prompts.

    python -m benchmarks.exact [--items 500] [--dtype bfloat16] [--target-bits 8] [--alone 40]
                              [--outside 500]

Runs the bundled pair with drafts, of which rounds choose how many, without drafts (the baseline),
some items without drafts and alone in a single slot, some with mlx-lm's own greedy generation;
prints one JSON line.
The first three must agree in every byte. Where mlx-lm differs, the margin of the choice is told:
how far the logits of its token and of ours lie apart in a pass of its own.
"""

import argparse
import time

from benchmarks.common import print_line, requests, surroundings
from benchmarks.throughput import mlx_lm_generate
from dspark_batch.baseline.margins import margins
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.pair import load_pair
from recipes.tiny.corpus import held_out_turns
from recipes.tiny.tasks import KINDS

MAX_TOKENS = 128


def answers(pair, work, **settings):
    """Answer with the engine; token ids in the order of the work."""
    engine = Engine(pair, **settings)
    completions = sorted(engine.generate(work), key=lambda c: c.item.index)
    lengths = [n for c in completions for n in c.accept_lengths]
    told = {"accept_length": round(sum(lengths) / max(1, len(lengths)), 3)}
    return [c.token_ids for c in completions], told


def differences(pair, work, ours, theirs):
    """List where two answers part, and how clear the choice was."""
    found = []
    for request, a, b in zip(work, ours, theirs, strict=True):
        if a == b:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            found.append({"item": request.item.index, "lengths": [len(a), len(b)]})
            continue
        top_2, spread = margins(pair, request, a[:at], (a[at], b[at]))
        found.append(
            {
                "item": request.item.index,
                "position": at,
                "tokens": [a[at], b[at]],
                "top_2_margin": round(top_2, 5),
                "margin": round(spread, 5),
            }
        )
    return found


def measure(options):
    """Run all contestants and compare them."""
    pair = load_pair(dtype=options.dtype, target_bits=options.target_bits)
    turns = held_out_turns("exact", -(-options.items // len(KINDS)))[: options.items]
    work = requests(pair, [turn.task.prompt for turn in turns], MAX_TOKENS)
    began = time.perf_counter()
    setup = set_up(pair, max_tokens=MAX_TOKENS)
    setup_s = time.perf_counter() - began
    plan = {"slots": setup.plan.slots, "shapes": setup.shapes}
    drafted, told = answers(pair, work, **plan, lengths=setup.lengths, costs=setup.costs)
    plain, _ = answers(pair, work, **plan, draft_length=0, prefix_positions=0)
    settings = {"slots": 1, "shapes": setup.shapes, "draft_length": 0, "prefix_positions": 0}
    alone, _ = answers(pair, work[: options.alone], **settings)
    compared = work[: options.outside]
    outside = mlx_lm_generate(pair, compared)
    differ = differences(pair, compared, drafted[: len(compared)], outside)
    return {
        **surroundings(),
        "dtype": pair.config.dtype,
        "target_bits": options.target_bits,
        "items": len(work),
        "tokens": sum(map(len, plain)),
        "plan": setup.plan.why,
        "step_shape": setup.shapes.fixed,
        "numerics": setup.conformance.numerics,
        "divergence": setup.conformance.divergence,
        "setup_s": round(setup_s, 3),
        **told,
        "items_different_from_baseline": sum(a != b for a, b in zip(drafted, plain, strict=True)),
        "items_different_alone": sum(a != b for a, b in zip(alone, plain, strict=False)),
        "items_alone": len(alone),
        "items_compared_with_mlx_lm": len(compared),
        "items_different_from_mlx_lm": len(differ),
        "differences_from_mlx_lm": differ,
    }


def main():
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--target-bits", type=int)
    parser.add_argument("--alone", type=int, default=40)
    parser.add_argument("--outside", type=int, help="items for mlx-lm; all of them if left out")
    print_line({"benchmark": "exact", **measure(parser.parse_args())})


if __name__ == "__main__":
    main()
