"""What quantising the drafter costs in accepted drafts, and what it costs or saves in time.

    python -m benchmarks.drafter_bits [--items 24] [--bits stored 8 4 3]

Prints one JSON line: for each number of bits the mean accept length (bonus included) of greedy
answers to held-out items, the bytes of the drafter, and the time of the whole. `4 without markov`
and the like leave a part of the drafter as it is stored.
"""

import argparse
import time

import mlx.nn as nn
from mlx.utils import tree_flatten

from benchmarks.common import held_out_records, print_line, requests, surroundings
from dspark_batch.engine.engine import Engine
from dspark_batch.models import quantisation
from dspark_batch.pair import load_pair

MAX_TOKENS, SLOTS = 96, 8
PARTS = {"markov": "markov_head", "ends": ("embed_tokens", "lm_head"), "fc": "fc"}


def load(words, family):
    """Load the pair as `8`, or as `4 without markov`, says."""
    bits, _, part = words.partition(" without ")
    pair = load_pair(family, drafter_bits=None, dtype="float32")
    if bits != "stored":
        kept = PARTS[part] if part else "no such part"
        nn.quantize(
            pair.drafter,
            quantisation.GROUP_SIZE,
            int(bits),
            class_predicate=lambda path, module: (
                quantisation.is_large_matrix(path, module) and not path.startswith(kept)
            ),
        )
    return pair


def measure(words, args):
    pair = load(words, args.family)
    prompts = [record["prompt"] for record in held_out_records(args.items)]
    work = requests(pair, prompts, MAX_TOKENS)
    began = time.perf_counter()
    answers = list(Engine(pair, slots=SLOTS).generate(work))
    seconds = time.perf_counter() - began
    lengths = [length for answer in answers for length in answer.accept_lengths]
    weights = tree_flatten(pair.drafter.parameters())
    return {
        "accept_length": round(sum(lengths) / len(lengths), 3),
        "drafter_bytes": sum(array.nbytes for _, array in weights),
        "quantised": quantisation.described(pair.drafter),
        "seconds": round(seconds, 2),
        "tokens": sum(len(answer.token_ids) for answer in answers),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--family", default="tiny")
    parser.add_argument("--bits", nargs="+", default=["stored", "8", "4", "3"])
    args = parser.parse_args()
    results = {words: measure(words, args) for words in args.bits}
    print_line(surroundings() | {"items": args.items, "dtype": "float32", "by_bits": results})


if __name__ == "__main__":
    main()
