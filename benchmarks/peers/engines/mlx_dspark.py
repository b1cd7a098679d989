"""mlx-dspark; settings: mode, slots, drafts, bits.

mode "slots" is its engine for many requests with drafts (SpecSlots), "batch" its batches without
drafts, "one" one prompt after the other with drafts, look-ups and its prefix cache, which its
batches do not use.
"""

from functools import cache

from mlx_dspark import load_drafter, load_target, speculative_generate
from mlx_dspark.batch_engine import SpecSlots, batch_generate_baseline
from mlx_dspark.generate import eos_token_ids
from mlx_dspark.prefix_cache import PrefixCache


def load(target, drafter, stop_ids):
    """Load the pair; a quantised drafter only if a setting asks for it."""
    model, tokenizer = load_target(target, require_tap=True)
    # It adds the padding token, which greedy answers never have; their ids are compared.
    if not eos_token_ids(tokenizer) >= set(stop_ids):
        raise ValueError(f"stop ids {sorted(eos_token_ids(tokenizer))}, expected {stop_ids}")

    @cache
    def drafter_of(bits):
        return load_drafter(drafter, quantize=bits is not None, bits=bits or 4)[0]

    def answer(prompts, max_tokens, mode, slots=1, drafts=None, bits=None):
        if mode == "batch":
            results = _batches(model, tokenizer, prompts, max_tokens, slots)
        elif mode == "slots":
            engine = SpecSlots(
                model, tokenizer, drafter_of(bits), capacity=slots, max_draft_tokens=drafts
            )
            results = _slots(engine, prompts, max_tokens)
        else:
            results = _one_by_one(model, tokenizer, drafter_of(bits), prompts, max_tokens, drafts)
        # Its drafts run over the limit.
        return [result.token_ids[:max_tokens] for result in results]

    return answer


def _one_by_one(model, tokenizer, drafter, prompts, max_tokens, drafts):
    kept, results = PrefixCache(model.make_cache, drafter.make_ctx_cache), []
    for ids in prompts:
        cache, context, length = kept.acquire(ids)
        results.append(
            speculative_generate(
                model,
                tokenizer,
                drafter,
                prompt_ids=ids,
                cache=cache,
                ctx_caches=context,
                reuse_len=length,
                max_new_tokens=max_tokens,
                max_draft_tokens=drafts,
            )
        )
        kept.store(cache, context, ids, results[-1].token_ids)
    return results


def _batches(model, tokenizer, prompts, max_tokens, size):
    results = []
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        results += batch_generate_baseline(model, tokenizer, part, max_new_tokens=max_tokens)
    return results


def _slots(engine, prompts, max_tokens):
    """Admit whenever a slot is free, as its server does."""
    results, left = {}, list(enumerate(prompts))[::-1]
    while left or engine.n_active:
        while left and engine.has_free_slot:
            index, ids = left.pop()
            engine.admit(ids, max_new_tokens=max_tokens, meta=index)
        results.update(engine.step())
    return [results[index] for index in range(len(prompts))]
