"""Any shape of a step gives a token the same bits: logits, keys and values.

    python tests/properties/any_shape.py NAME SEED [SLOTS...]

NAME is `tiny`, a golden case, or a size like 96x4x2x48 (hidden, heads, key heads, MLP; with `moe`
in front: of experts). Prints what differed, then the BLAS. A process of its own has a BLAS, a
kernel and a number of threads of its own.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dspark_batch import blas  # isort: skip  before MLX

import mlx.core as mx
import numpy as np
from golden_cases import load_case
from mlx_lm.models import qwen3, qwen3_moe

from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.passes import Passes
from dspark_batch.models.activations import make_activations_fast
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.models.target import Target
from dspark_batch.pair import load_pair

SLOTS = (1, 2, 3, 5, 7, 8, 16, 31, 32, 33, 64)
WIDTHS = (1, 2, 3, 5, 8, 16)
PROMPTS = (1, 9, 70)  # tokens of the contents
PIECES = ((), (5,), (20, 64))  # where pieces end that a prompt may begin with
CHUNKS = (1, 5, 7, 16, 33, 64, 70)  # widths of the passes over prompts
STEPS = 16  # tokens behind each prompt


def random_target(size, *, seed=3, dtype=mx.float32, moe=False, bits=None):
    """Make a target with random weights; a size is hidden x heads x key heads x MLP."""
    hidden, heads, kv_heads, mlp = map(int, size.split("x"))
    head_dim = 16 if hidden < 128 else 64
    common = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": 777,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "head_dim": head_dim,
        "tie_word_embeddings": hidden % 3 == 0,
    }
    mx.random.seed(seed)  # noqa: TID251  weights only
    if moe:
        extra = {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": mlp,
            "norm_topk_prob": True,
        }
        model = qwen3_moe.Model(
            qwen3_moe.ModelArgs(**(common | {"model_type": "qwen3_moe"} | extra))
        )
    else:
        model = qwen3.Model(qwen3.ModelArgs(**common))
    model.set_dtype(dtype)
    if bits:
        import mlx.nn as nn

        nn.quantize(model, 32, bits)
    mx.eval(model.parameters())
    make_rows_safe(model)
    make_activations_fast(model)
    return Target(model)


def target_of(name):
    if name == "tiny":
        return load_pair("tiny", dtype="float32").target
    if name[0].isdigit() or name.startswith("moe"):
        return random_target(name.removeprefix("moe"), moe=name.startswith("moe"))
    return load_case(name).pair.target


def ids(content, start, count):
    return [
        (31 * content + 7 * place + place * place) % 120 for place in range(start, start + count)
    ]


def bits(array):
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()


class Bench:
    def __init__(self, target):
        self.passes = Passes(target, NoDrafter())
        self.target = target
        self.checks = 0

    def run(self, contents, widths, prompt_widths, room, *, in_pieces=False):
        """Run contents side by side in steps of the given widths; bits by content.

        With `in_pieces`, prompts begin with what a slot alone has computed, as the prefix cache
        would put it together.
        """
        slots, lengths = len(contents), [PROMPTS[c] for c in contents]
        cache = self.target.make_cache(slots, 0)
        cache.reserve(max(lengths) + STEPS + max(prompt_widths + widths) + room)
        done = [0] * slots
        if in_pieces:
            pieces = {content: self._pieces(content) for content in set(contents)}
            cache.begin_with([pieces[content] for content in contents])
            done = [max((0, *PIECES[content])) for content in contents]
        logits = [[] for _ in contents]
        left = list(prompt_widths)
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            done = self._step(
                cache, contents, done, lengths, left.pop(0) if len(left) > 1 else left[0]
            )
        start, ends = lengths, [n + STEPS for n in lengths]
        left, done = list(widths), list(lengths)
        while any(d < n for d, n in zip(done, ends, strict=True)):
            width = left.pop(0) if len(left) > 1 else left[0]
            done = self._step(cache, contents, done, ends, width, logits)
        found = {}
        for slot, content in enumerate(contents):
            told = bits(mx.concatenate(logits[slot]))
            parts = cache.snapshot(slot, 0, start[slot] + STEPS).arrays
            found.setdefault(content, set()).add((told, b"".join(map(bits, parts))))
            self.checks += 1
        return found

    def _pieces(self, content):
        cache = self.target.make_cache(1, PROMPTS[content])
        parts, start = [], 0
        for end in PIECES[content]:
            self._step(cache, [content], [start], [end], end - start)
            parts.append(cache.snapshot(0, start, end))
            start = end
        return parts

    def _step(self, cache, contents, done, ends, width, logits=None):
        counts = [min(width, end - d) for d, end in zip(done, ends, strict=True)]
        tokens = [
            ids(c, d, n) + [0] * (width - n) for c, d, n in zip(contents, done, counts, strict=True)
        ]
        if logits is None:  # of prompts it is known before how many tokens stay
            cache.expect(mx.array(counts))
        said, _ = self.passes.run(cache, mx.array(tokens))
        cache.keep(mx.array(counts))
        mx.eval(said, cache.arrays())
        if logits is not None:
            for slot, count in enumerate(counts):
                logits[slot].append(said[slot, :count])
        return [d + n for d, n in zip(done, counts, strict=True)]


def differences(target, seed, all_slots=SLOTS, bench=None):
    rng, bench = random.Random(seed), bench or Bench(target)
    known = {c: found for c in range(len(PROMPTS)) for found in [bench.run([c], [8], [32], 0)[c]]}
    if any(len(found) > 1 for found in known.values()):
        yield "one content alone has several bits"
    for slots in all_slots:
        for width in WIDTHS:
            contents = [rng.randrange(len(PROMPTS)) for _ in range(slots)]
            widths = [width, rng.choice(WIDTHS), width]
            prompts = rng.choices(CHUNKS, k=2) if slots < 9 else [rng.choice((7, 64, 70))]
            room, in_pieces = rng.choice((0, 0, 100, 300)), rng.choice((True, False))
            found = bench.run(contents, widths, prompts, room, in_pieces=in_pieces)
            for content in found:
                if found[content] != known[content]:
                    how = f"widths {widths}, prompts by {prompts}, room {room}, pieces {in_pieces}"
                    yield f"{slots} slots, {how}: {content}"


def main():
    name, seed, *slots = sys.argv[1:]
    for difference in differences(target_of(name), int(seed), tuple(map(int, slots)) or SLOTS):
        sys.stdout.write(f"{difference}\n")
    sys.stdout.write(f"{blas.identity()}\n")


if __name__ == "__main__":
    main()
