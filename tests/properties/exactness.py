"""Independence and losslessness: the same bytes by every way through the engine.

    python tests/properties/exactness.py PAIR SEED...   prints what differed; nothing if all agrees

Also run in a process of its own, because a process has one BLAS.
"""

import random
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dspark_batch import blas  # isort: skip  before MLX

from golden_cases import load_case

from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.pair import load_pair
from dspark_batch.types import Item, Request, Sampling

SLOTS = (1, 2, 7, 16)
HYBRIDS = ("qwen35_dflash", "qwen35_dflash_b16", "qwen35_moe_dflash")
# gemma4's window is shorter than the texts
PAIRS = ("tiny", "qwen3_vanilla", "gemma4_vanilla", *HYBRIDS)
COUNT = 7


@cache
def loaded(name):
    return load_pair("tiny", dtype="float32") if name == "tiny" else load_case(name).pair


@cache
def setup(name):
    return set_up(loaded(name), max_tokens=40)


def vocabulary(name):
    return 1500 if name == "tiny" else 120 if name in HYBRIDS else 150


def requests(name, seed):
    """Prompts of mixed lengths; some begin alike, some are sampled."""
    rng = random.Random(f"{name} {seed}")
    beginnings = [[rng.randrange(3, vocabulary(name)) for _ in range(n)] for n in (0, 19, 42)]
    found = []
    for index in range(COUNT):
        own = [rng.randrange(3, vocabulary(name)) for _ in range(rng.choice((1, 2, 9, 30)))]
        temperature = rng.choice((0.0, 0.0, 0.8))
        sampling = Sampling(temperature=temperature, top_p=rng.choice((1.0, 0.9)), seed=seed)
        item = Item(index, str(index), f"digest-{seed}-{index}", f"test:{index}")
        ids = (*rng.choice(beginnings), *own)
        found.append(Request(item, ids, rng.choice((1, 5, 9, 17)), sampling))
    return found


def answers(name, work, **settings):
    engine = Engine(loaded(name), shapes=setup(name).shapes, **settings)
    return {c.item.index: (c.token_ids, c.finish_reason) for c in engine.generate(work)}


def alone(name, work):
    """The baseline: one after the other, without drafts, nothing cached from others."""
    return answers(name, work, slots=1, draft_length=0, prefix_positions=0)


def ways(name, seed, all_slots):
    """Draw ways through the engine."""
    rng = random.Random(f"ways {name} {seed}")
    most = setup(name).lengths[-1]
    for slots in all_slots:
        settings = {
            "slots": slots,
            "draft_length": rng.choice((0, 1, 3, most, None, None)),
            "prefix_positions": rng.choice((0, 64, 1 << 14)),
        }
        if settings["draft_length"] is None:
            settings |= {"lengths": setup(name).lengths, "costs": setup(name).costs}
        yield settings


def differences(name, seed, all_slots=SLOTS):
    """Answer in random ways, orders and parts; describe what is not the baseline."""
    rng, work = random.Random(seed), requests(name, seed)
    expected = alone(name, work)
    for settings in ways(name, seed, all_slots):
        rng.shuffle(work)
        middle = rng.randrange(len(work))  # a resume: another engine goes on
        found = answers(name, work[:middle], **settings) | answers(name, work[middle:], **settings)
        for index in range(COUNT):
            if found[index] != expected[index]:
                yield f"{name} {seed} {settings} {blas.LOADED.kind}: item {index}"


def main():
    name, *seeds = sys.argv[1:]
    for seed in map(int, seeds):
        for difference in differences(name, seed):
            sys.stdout.write(f"{difference}\n")
    sys.stdout.write(f"blas {blas.LOADED.kind}\n")


if __name__ == "__main__":
    main()
